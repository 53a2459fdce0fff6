"""ZeRO: replicas divide states, gradients and parameters, and train as if they did not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pipecompile
import pytest
import torch
from support import jobs, models, plain
from support.gang import Gang
from support.matrix import quickly
from support.zero import LEVELS, Odd, accumulate, assert_equal, small_parcels
from torch import nn

BF16 = torch.bfloat16

NAMED = {None: None, "bf16": BF16, "fp16": torch.float16}


@dataclass(frozen=True)
class Bounds:
    """Differences after 5 steps: of losses and norms, relative; of the worst element, and of a
    tensor's mean. Each is two to three times the largest in `test_all_divisions_train_as_one`."""

    loss: float
    norm: float
    worst: float
    mean: float


# At levels 2 and 3 the replicas' mean is added up per microbatch, in another order than in one
# process. SGD leaves it at that. AdamW divides by the root of the second moment: an element whose
# gradient is rounding alone, as that of a key's bias is (softmax takes no notice of it), moves by
# its noise over eps=1e-8 in fp32. In bf16 the noise is far above eps, and such an element makes
# steps of the learning rate (0.01) in either direction; other copies round the other way.
CLIPPED = {
    ("sgd", None): Bounds(3e-7, 3e-7, 2e-8, 4e-10),
    ("sgd", "bf16"): Bounds(3e-7, 1e-5, 1e-6, 4e-8),
    ("adamw", None): Bounds(3e-7, 1.2e-6, 2.5e-5, 8e-7),
    ("adamw", "bf16"): Bounds(2e-4, 2e-2, 3e-2, 2.5e-3),
}

UNCLIPPED = {
    ("sgd", None): Bounds(3e-7, 3e-7, 3e-8, 3e-9),
    ("sgd", "bf16"): Bounds(2e-5, 1e-3, 1.5e-4, 1e-5),
    ("adamw", None): Bounds(3e-7, 2e-6, 6e-5, 6e-6),
    ("adamw", "bf16"): Bounds(2e-4, 2e-2, 4e-2, 5e-3),
}

# torch's fused AdamW rounds otherwise at the end of a vector, and rows end elsewhere than
# parameters: an ulp per step, which a key's bias again turns into more.
FUSED = Bounds(3e-7, 3e-7, 5e-6, 5e-7)


def grouped(named: Any, make: Callable[[Any], torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """Two groups by name: no weight decay for biases and norms."""
    named = list(named)
    plain_names = [(n, p) for n, p in named if n.endswith("bias") or "ln_" in n or "norm" in n]
    rest = [(n, p) for n, p in named if (n, p) not in plain_names and n not in dict(plain_names)]
    groups = [
        {"params": [p for _, p in rest], "weight_decay": 0.1},
        {"params": [p for _, p in plain_names], "weight_decay": 0.0, "lr": 5e-3},
    ]
    return make([group for group in groups if group["params"]])


OPTIMIZERS = {
    "sgd": partial(grouped, make=partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
    "adamw": partial(grouped, make=partial(torch.optim.AdamW, lr=1e-2)),
    "fused": partial(grouped, make=partial(torch.optim.AdamW, lr=1e-2, fused=True)),
}


@small_parcels()
def train(
    name: str,
    n_stages: int,
    dp: int,
    optimizer: str,
    zero: int,
    max_norm: float = 0.1,
    steps: int = 5,
    microbatches: int = 2,
    **options: Any,
) -> plain.Trained:
    """Train with small parcels; gradients put together."""
    pipe = jobs.pipeline(
        name, n_stages, dp, microbatches, optimizer=OPTIMIZERS[optimizer], zero=zero, **options
    )
    return plain.train_pipeline(pipe, models.batches(name, 2 * dp * microbatches, steps), max_norm)


def divided_norm(params: Any, max_norm: float) -> torch.Tensor:
    """Clip by the norm that is summed in fp64 over all elements."""
    grads = [p.grad for p in params if p.grad is not None]
    total = math.sqrt(math.fsum(float(g.double().square().sum()) for g in grads))
    norm = torch.tensor(total, dtype=torch.float32)
    for grad in grads:
        grad.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


@functools.cache
def oracle(
    name: str, dp: int, optimizer: str, precision: str | None, max_norm: float, own_norm: bool
) -> plain.Trained:
    """One process; ``own_norm`` clips by torch's own norm instead of that in fp64."""
    model = models.build(name)
    named = dict(model.named_parameters())

    def make(_: Any) -> torch.optim.Optimizer:
        return OPTIMIZERS[optimizer](list(named.items()))

    return plain.train(
        model,
        models.batches(name, 4 * dp, 5),
        make,
        dp,
        2,
        max_norm,
        NAMED[precision],
        clip=nn.utils.clip_grad_norm_ if own_norm else divided_norm,
    )


def assert_close(found: plain.Trained, expected: plain.Trained, bounds: Bounds) -> None:
    """The first step's loss is equal; then the bounds."""
    assert torch.equal(found.losses[0], expected.losses[0])
    for a, b in zip(found.losses, expected.losses, strict=True):
        assert torch.allclose(a, b, rtol=bounds.loss, atol=0)
    for a, b in zip(found.norms, expected.norms, strict=True):
        assert torch.allclose(a, b, rtol=bounds.norm, atol=0)
    for name, value in expected.params.items():
        if value.is_floating_point():
            difference = (found.params[name] - value).abs()
            assert difference.max() <= bounds.worst, name
            assert difference.mean() <= bounds.mean, name


# -- numbers --------------------------------------------------------------------------------------

QUICK = [
    pytest.param(("gpt2", 2, 2, "adamw", None), 1, marks=pytest.mark.slow),
    (("gpt2", 2, 2, "adamw", None), 3),
    pytest.param(("llama", 1, 3, "sgd", "bf16"), 2, marks=pytest.mark.slow),
]

FULL = [
    ((name, n_stages, dp, optimizer, precision), zero, max_norm)
    for name in ("gpt2", "llama")
    for n_stages in (1, 2, 3)
    for dp in (1, 2, 3)
    for optimizer in OPTIMIZERS
    for precision in (None, "bf16")
    for zero in ((0, *LEVELS) if dp > 1 else (0,))
    for max_norm in (0.1, 1e9)
    if n_stages * dp < 9 or optimizer == "adamw"  # 9 processes, one kind of training
    if max_norm < 1 or ((n_stages, dp) in ((1, 3), (2, 2)) and optimizer != "fused")
]


@pytest.mark.parametrize(("setting", "zero"), QUICK, ids=str)
def test_processes_train_as_one(gang: Callable[[int], Gang], setting: Any, zero: int) -> None:
    """Uneven rows too: 96 by 3 and 32 by 3. Level 1 has the bits of one process; one process that
    plays all ranks has the bits of the processes, at every level."""
    compare(gang, setting, zero, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "zero", "max_norm"), FULL, ids=str)
def test_all_divisions_train_as_one(
    gang: Callable[[int], Gang], setting: Any, zero: int, max_norm: float
) -> None:
    """Unclipped (1e9) for two of the divisions: one process clips all of them alike."""
    compare(gang, setting, zero, max_norm)


def compare(gang: Callable[[int], Gang], setting: Any, zero: int, max_norm: float) -> None:
    name, n_stages, dp, optimizer, precision = setting
    options: dict[str, Any] = {"max_norm": max_norm, "precision": precision}
    args = (name, n_stages, dp, optimizer, zero)
    expected = oracle(name, dp, optimizer, precision, max_norm, zero == 0)
    alone = train(*args, **options)
    if zero <= 1:
        assert_equal(alone, expected)
    else:
        bounds = CLIPPED if max_norm < 1 else UNCLIPPED
        assert_close(alone, expected, bounds[optimizer.replace("fused", "adamw"), precision])
    for found in gang(n_stages * dp).run(train, *args, **options):
        if optimizer == "fused" and zero:
            assert_close(found, alone, FUSED)
        else:
            assert_equal(found, alone)


def test_the_norm_is_that_of_one_process_but_for_rounding() -> None:
    own = oracle("gpt2", 2, "adamw", None, 0.1, True)
    fp64 = oracle("gpt2", 2, "adamw", None, 0.1, False)
    assert torch.allclose(own.norms[0], fp64.norms[0], rtol=1e-6, atol=0)
    assert_close(fp64, own, CLIPPED["adamw", None])


TIED, SPLIT = {"tied_grads": "per_step"}, {"schedule": "zb_h1"}

ONE_BY_ONE = [(1, TIED), (2, TIED), (1, SPLIT), (3, SPLIT)]


@pytest.mark.parametrize(
    ("zero", "options"),
    [
        pytest.param(1, TIED | SPLIT, marks=pytest.mark.slow),
        pytest.param(3, TIED | SPLIT, marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ONE_BY_ONE),
    ],
    ids=str,
)
def test_schedules_and_tied_sums(
    gang: Callable[[int], Gang], zero: int, options: dict[str, Any]
) -> None:
    alone = train("gpt2", 2, 2, "adamw", zero, **options)
    expected = oracle("gpt2", 2, "adamw", None, 0.1, False)
    assert_close(alone, expected, CLIPPED["adamw", None])
    for found in gang(4).run(train, "gpt2", 2, 2, "adamw", zero, **options):
        assert all(torch.equal(found.params[n], alone.params[n]) for n in alone.params)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_loss_scaling_and_overflows(gang: Callable[[int], Gang], zero: int) -> None:
    precision = pipecompile.Precision(
        compute=torch.float16, loss_scale=pipecompile.LossScale(init=2.0**40)
    )
    alone = train("llama", 1, 2, "sgd", zero, precision=precision)
    assert any(not grads for grads in alone.grads)
    for found in gang(2).run(train, "llama", 1, 2, "sgd", zero, precision=precision):
        assert [not g for g in found.grads] == [not g for g in alone.grads]
        assert all(torch.equal(found.params[n], alone.params[n]) for n in alone.params)


@small_parcels(32)
def accumulated(zero: int) -> dict[str, torch.Tensor]:
    """With frozen weights and a weight without dimensions; parcels of a row or two."""
    pipe = pipecompile.compile(
        Odd(),
        1,
        2,
        microbatches=2,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        zero=zero,
        device="cpu",
    )
    torch.manual_seed(4)
    found = accumulate(pipe, [torch.randn(8, 5) for _ in range(4)])
    states = sum(t.numel() for s in pipe.optimizer.state.values() for t in s.values() if t.dim())
    return {**found, "states": torch.tensor(states)}


@pytest.mark.parametrize("zero", quickly([3], LEVELS))
def test_odd_parameters_and_accumulation(gang: Callable[[int], Gang], zero: int) -> None:
    alone, whole = accumulated(zero), accumulated(0)
    for found in gang(2).run(accumulated, zero):
        assert found["states"] < whole["states"]
        for name in alone.keys() - {"states"}:
            assert torch.equal(found[name], alone[name]), name
            assert torch.allclose(found[name], whole[name], rtol=1e-4, atol=1e-5), name
