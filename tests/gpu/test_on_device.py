"""What is promised of one device, on the device at hand: see conftest."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.passes.attention.kernels import attention
from support import jobs, models, plain
from support.graphs import recording
from support.matrix import quickly
from support.on_device import train, train_plainly, worst
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

BF16, FP16 = torch.bfloat16, torch.float16
CLOSE = {None: 1e-4, "bf16": 3e-2}  # of Inductor's kernels to eager ones, relative

if torch.cuda.is_available():  # the small part is for those who wait for a CPU
    quickly = lambda _, cases: list(cases)  # noqa: E731

oracle = functools.cache(train_plainly)


@pytest.mark.parametrize(
    ("name", "n_stages", "dp"),
    quickly(
        [("gpt2", 2, 1)],
        [
            ("gpt2", 1, 1),
            ("gpt2", 2, 1),
            ("gpt2", 2, 2),
            ("llama", 3, 1),
            ("bert-mlm", 2, 1),
            ("bart", 2, 1),
            ("t5", 2, 1),
            ("mixtral", 2, 1),
            ("vit", 2, 1),
        ],
    ),
)
def test_a_pipeline_is_plain_training_bit_for_bit(
    device: str, name: str, n_stages: int, dp: int
) -> None:
    plain.assert_equal(train(device, name, n_stages, dp, 2), oracle(device, name, dp, 2))


@pytest.mark.parametrize("schedule", quickly([], ["gpipe", "zb_h1", "interleaved", "zb_v", "zb"]))
def test_schedules_give_the_same_bits(device: str, schedule: str) -> None:
    found = train(device, "llama-deep", 2, 1, 4, schedule=schedule)
    plain.assert_equal(found, oracle(device, "llama-deep", 1, 4))


@pytest.mark.parametrize("zero", quickly([], [1, 2, 3]))
def test_zero_in_one_process(device: str, zero: int) -> None:
    found = train(device, "gpt2", 2, 2, 2, zero=zero)
    expected = oracle(device, "gpt2", 2, 2)
    torch.testing.assert_close(found.losses, expected.losses)
    torch.testing.assert_close(found.params, expected.params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"), quickly([], [("gpt2", BF16), ("llama", BF16), ("gpt2", FP16)])
)
def test_precision_is_that_of_autocast(device: str, name: str, dtype: torch.dtype) -> None:
    precision = "bf16" if dtype is BF16 else "fp16"
    found = train(device, name, 2, 1, 2, precision=precision)
    expected = oracle(device, name, 1, 2, dtype=dtype)
    for a, b in zip(found.losses, expected.losses, strict=True):
        assert torch.equal(a, b)
    for name_, value in expected.params.items():
        assert torch.equal(found.params[name_], value), name_


@pytest.mark.parametrize("precision", quickly([], ["bf16_params", "fp16_params"]))
def test_narrow_parameters_learn(device: str, precision: str) -> None:
    pipe = jobs.pipeline("gpt2", 2, 1, 2, device=device, precision=precision)
    batch = models.batches("gpt2", 4, 1)[0]
    losses = [float(pipe.step(batch)) for _ in range(12)]
    assert min(losses[6:]) < losses[0]


@pytest.mark.parametrize("name", quickly([], ["gpt2", "llama"]))
def test_what_is_computed_again_has_the_same_bits(device: str, name: str) -> None:
    found = train(device, name, 2, 1, 2, remat="full")
    plain.assert_equal(found, oracle(device, name, 1, 2))


class Dropped(nn.Module):
    """Dropout in attention, behind it and between layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = functools.partial(nn.TransformerEncoderLayer, 32, 2, 64, batch_first=True)
        self.layers = nn.ModuleList(layer(dropout=0.3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def dropped(device: str, n_stages: int, **options: Any) -> list[float]:
    torch.manual_seed(0)
    model, x = Dropped(), torch.randn(8, 6, 32)
    pipe = pipecompile.compile(
        model,
        n_stages,
        microbatches=4,
        optimizer=jobs.SGD,
        device=device,
        seed=5,
        backend="eager",
        **options,
    )
    return [float(pipe.step(x)) for _ in range(3)]


@pytest.mark.slow
def test_masks_do_not_depend_on_the_division(device: str) -> None:
    one, two = dropped(device, 1), dropped(device, 2)
    assert one == two
    assert len(set(one)) == 3


@pytest.mark.slow
def test_a_checkpoint_goes_on_under_another_division(device: str, tmp_path: Path) -> None:
    batches = models.batches("gpt2", 8, 4)
    first = jobs.pipeline("gpt2", 2, 1, 4, device=device, backend="eager")
    for batch in batches[:2]:
        first.step(batch)
    first.save(tmp_path)
    second = jobs.pipeline("gpt2", 1, 1, 4, device=device, backend="eager")
    second.compile_for(batches[0])
    second.load(tmp_path)
    for batch in batches[2:]:
        assert torch.equal(first.step(batch).cpu(), second.step(batch).cpu())
    assert plain.equal(first.state_dict(), second.state_dict())


@pytest.mark.slow
def test_evaluation_and_outputs_are_the_models(device: str) -> None:
    batch = models.batches("gpt2", 4, 1)[0]
    pipe = jobs.pipeline("gpt2", 2, 1, 2, device=device, backend="eager")
    model = models.build("gpt2").to(device).eval()
    with torch.no_grad():
        pieces = plain.cut({k: v.to(device) for k, v in batch.items()}, 2)
        made = [model(**piece) for piece in pieces]
    logits, loss = torch.cat([m.logits for m in made]), torch.stack([m.loss for m in made]).mean()
    assert torch.equal(pipe.forward(batch)["logits"].cpu(), logits.cpu())
    assert torch.equal(pipe.evaluate(batch).cpu(), loss.cpu())


@pytest.mark.parametrize("precision", quickly([], [None, "bf16"]))
def test_inductor_differs_by_rounding_alone(device: str, precision: str | None) -> None:
    run = functools.partial(train, device, "gpt2", 2, 1, 2, precision=precision, steps=1)
    assert worst(run(backend="inductor"), run()) < CLOSE[precision]


@contextmanager
def graphs_on(device: str) -> Iterator[None]:
    """A CPU has a stand-in for CUDA graphs."""
    if device == "cuda":
        yield
        return
    with recording():
        yield


@pytest.mark.parametrize(
    ("name", "options"),
    quickly(
        [],
        [
            ("gpt2", {}),
            ("gpt2", {"precision": "bf16"}),
            ("llama", {"schedule": "zb_h1"}),
            ("bart", {"remat": "full"}),
            ("gpt2", {"backend": "inductor"}),
        ],
    ),
)
def test_recorded_programs_have_the_bits_of_those_that_run(
    device: str, name: str, options: dict[str, Any]
) -> None:
    run = functools.partial(train, device, name, 2, 1, 4, steps=4, **options)
    with graphs_on(device):
        plain.assert_equal(run(cudagraphs=True), run())


@pytest.mark.slow
def test_recorded_programs_draw_the_masks_of_those_that_run(device: str) -> None:
    with graphs_on(device):
        assert dropped(device, 2, cudagraphs=True) == dropped(device, 2)


@contextmanager
def nobody_waits(device: str) -> Iterator[None]:
    """Inside, to wait for the device is an error."""
    if device != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.slow
def test_a_step_waits_for_nothing_but_who_reads_its_loss(device: str) -> None:
    batches = models.batches("gpt2", 4, 3)
    options = {"device": device, "backend": "eager", "max_grad_norm": 1.0}
    pipe = jobs.pipeline("gpt2", 2, 1, 2, **options)
    losses = [pipe.step(batches[0])]
    if device == "cuda":
        batches = [{k: v.pin_memory() for k, v in batch.items()} for batch in batches]
    with nobody_waits(device):
        losses += [pipe.step(batch) for batch in batches[1:]]
    assert all(loss.isfinite() for loss in losses)


def trained_by_rank(device: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """What a process of a gang runs: a rank of two stages."""
    if device == "cuda":  # as the fixture has it
        torch.use_deterministic_algorithms(True, warn_only=True)
    found = train(device, "gpt2", 2, 1, 2)
    return found.losses, found.params


@pytest.mark.slow
def test_processes_have_the_bits_of_one(device: str, request: pytest.FixtureRequest) -> None:
    """Over NCCL, with a device each, where there are two; over gloo on the CPU."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a device for each process, and there is one")
    expected = oracle(device, "gpt2", 1, 2)
    for losses, params in request.getfixturevalue("gang")(2).run(trained_by_rank, device):
        assert plain.equal(losses, expected.losses)
        assert plain.equal(params, expected.params)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    ("width", "of_values"), quickly([], [(64, 64), (80, 80), (30, 30), (64, 32), (288, 288)])
)
def test_attention_is_planned_by_the_kernel_that_runs(
    device: str, width: int, of_values: int, masks: bool, dtype: torch.dtype, grouped: bool
) -> None:
    if device == "cpu":
        pytest.skip("its kernels are not those that are planned by")
    heads = 2 if grouped else 4
    shapes = [(2, 4, 32, width), (2, heads, 32, width), (2, heads, 32, of_values)]
    given = [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]
    mask = torch.ones(2, 1, 32, 32, dtype=torch.bool, device=device).tril() if masks else None

    def called(run: Any) -> set[str]:
        def both(*args: Any) -> Any:
            found = run(*args, mask, 0.1, not masks, enable_gqa=grouped)
            return torch.autograd.grad(found.float().sum(), args)

        nodes = make_fx(both)(*given).graph.nodes
        names = {str(node.target).split(".")[1] for node in nodes if node.op == "call_function"}
        return {name for name in names if "attention" in name}

    run = called(nn.functional.scaled_dot_product_attention)
    assert called(attention) == {name.replace("cudnn", "flash") for name in run}
