"""peft's adapters train as they do plainly, and what is frozen costs nothing that it need not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipecompile.errors import CaptureError
from support import plain
from support.adapters import (
    CONFIGS,
    MICROBATCHES,
    adapted,
    base,
    batch,
    compiled,
    lora,
    peft,
    share,
    trained_plainly,
)
from support.gang import Gang
from support.matrix import quickly
from torch import nn

STEPS = 2


def trained(name: str, n_stages: int, dp: int = 1, **options: Any) -> tuple[Any, Any]:
    pipe = compiled(adapted(CONFIGS[name]()), n_stages, dp, **options)
    losses = [pipe.step(share(pipe, step)) for step in range(STEPS)]
    return losses, pipe.state_dict()


# -- as plainly --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quickly(["lora"], CONFIGS))
@pytest.mark.parametrize("n_stages", quickly([2], [1, 2, 3]))
def test_every_method_trains_bit_for_bit(name: str, n_stages: int) -> None:
    expected, model = trained_plainly(adapted(CONFIGS[name]()), STEPS, MICROBATCHES)
    losses, state = trained(name, n_stages)
    assert plain.equal(losses, expected)
    assert plain.equal(state, dict(model.state_dict()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "zero"), [*(("upper", zero) for zero in range(3)), *((name, 3) for name in CONFIGS)]
)
def test_replicas_that_divide(gang: Callable[[int], Gang], name: str, zero: int) -> None:
    """Two replicas in processes are as two in one."""
    losses, state = trained(name, 1, 2, zero=zero)
    for found in gang(2).run(trained, name, 1, 2, zero=zero):
        assert plain.equal(found[0], losses)
        assert plain.equal(found[1], state)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_stages_in_processes(gang: Callable[[int], Gang], name: str) -> None:
    expected, model = trained_plainly(adapted(CONFIGS[name]()), STEPS, MICROBATCHES)
    for losses, state in gang(2).run(trained, name, 2):
        assert plain.equal(losses, expected)
        assert plain.equal(state, dict(model.state_dict()))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_in_bf16(name: str) -> None:
    """Near torch.autocast, and for every number of stages the same bits."""
    one, two = (trained(name, n, precision="bf16") for n in (1, 2))
    assert plain.equal(one, two)
    expected, _ = trained_plainly(adapted(CONFIGS[name]()), STEPS, MICROBATCHES, torch.bfloat16)
    for mine, theirs in zip(one[0], expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "zb_h1", "zb"])
def test_schedules(schedule: str) -> None:
    expected, model = trained_plainly(adapted(CONFIGS["upper"]()), STEPS, MICROBATCHES)
    losses, state = trained("upper", 2, schedule=schedule)
    assert plain.equal(losses, expected)
    assert plain.equal(state, dict(model.state_dict()))


# -- what is frozen ----------------------------------------------------------------------------


class Halves(nn.Module):
    """Of several equal layers only the last ones train: the first stage has none of these."""

    def __init__(self, n_layers: int, trains: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(n_layers)))
        self.layers[: n_layers - trains].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return {"loss": x.square().mean()}


def halves(trains: int = 2, n_stages: int = 3, dp: int = 1, **options: Any) -> Any:
    rows = torch.ones(8, 32)
    options = {"microbatches": 4, "example_batch": rows} | options
    return compiled(Halves(6, trains), n_stages, dp, **options)


@pytest.mark.parametrize(
    ("schedule", "dp"), quickly([("1f1b", 1)], [("1f1b", 1), ("1f1b", 2), ("zb_h1", 1), ("zb", 1)])
)
def test_stages_below_the_first_trained_layer_have_no_backward(schedule: str, dp: int) -> None:
    """In the plan: no seconds, bytes and messages; and nothing is exchanged between replicas."""
    pipe = halves(schedule=schedule, dp=dp)
    below = [
        s for s in pipe.plan.stages if not any(f"layers.{i}" in p for p in s.params for i in (4, 5))
    ]
    assert below
    for stage in below:
        assert stage.backward_s == stage.recompute_s == stage.backward_flops == 0
        assert stage.stash_bytes == stage.carry_bytes == 0
        assert stage.memory.grads == stage.memory.states == stage.closing_s == 0
        actions = pipe.plan.schedule[stage.rank].split()
        assert not [
            a for a in actions if "REDUCE" in a or "SEND_B" in a or "RECV_B" in a or "W" in a
        ]
        program = pipe.programs.stages[stage.stage]
        parts = [part for part in (program.backward, program.weight) if part is not None]
        assert not [n for p in parts for n in p.module.graph.nodes if n.op == "call_function"]
        assert not program.grads
    first = min(s.stage for s in pipe.plan.stages if s not in below)
    sent = {(t.dst, t.phase) for s in pipe.plan.stages[first:] for t in s.sends}
    assert not [each for each in sent if each[1] == "backward" and each[0] < first]


def test_the_plan_says_what_freezing_saves() -> None:
    """6 layers of 32 × 32 weights and 32 biases; AdamW has two states."""
    (said,) = [note for name, note in halves().plan.notes if name == "freezing"]
    assert said.startswith(
        "2,112 of 6,336 parameters are trained (33.33%): 16.5 KiB of gradients and about 33.0 KiB "
        "of optimizer states are not held; a microbatch's backward takes "
    )
    assert "no backward on stages 0" in said or "no backward on stage 0" in said
    assert not [name for name, _ in halves(trains=6).plan.notes if name == "freezing"]


def test_a_run_makes_nothing_for_frozen_parameters() -> None:
    pipe = halves()
    pipe.forward_backward(torch.ones(8, 32))
    for name, param in pipe.named_parameters():
        assert (param.grad is not None) == param.requires_grad == ("4" in name or "5" in name)
    pipe.optimizer.step()
    assert len(pipe.optimizer.state) == 4
    slots = [state.grads for state in pipe._session.state.ranks.values()]
    assert sum(len(each.slots) for each in slots) == 4


# -- a quantised base --------------------------------------------------------------------------


def quantised(weights: str) -> Any:
    """bf16 with torchao's weights in the layers, under adapters in fp32, as plain tensors."""
    torchao = pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    model = base().bfloat16()
    config = Int8WeightOnlyConfig()
    if weights == "int4":
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
    layers = {name for name, part in model.model.layers.named_modules() if type(part) is nn.Linear}
    torchao.quantization.quantize_(
        model.model.layers, config, filter_fn=lambda _, name: name in layers
    )
    torch.manual_seed(4)
    return peft.get_peft_model(model, lora())


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_quantised_base(weights: str, tmp_path: Path) -> None:
    """Bit for bit as plainly; the base is held, and left out of checkpoints, as it is."""
    model = quantised(weights)
    with pytest.raises(CaptureError, match=r"after torchao.utils.unwrap_tensor_subclass\(model\)"):
        compiled(model, 2).step(batch(0))
    from torchao.utils import unwrap_tensor_subclass

    unwrap_tensor_subclass(model)
    expected, after = trained_plainly(model, STEPS, MICROBATCHES)
    pipe = compiled(model, 2)
    losses = [pipe.step(batch(step)) for step in range(STEPS)]
    assert plain.equal(losses, expected)
    assert plain.equal(pipe.state_dict(), dict(after.state_dict()))
    narrow = [p for p in pipe.parameters() if p.dtype == torch.int8]
    assert len(narrow) >= 14
    pipe.save(tmp_path, trainable_only=True)
    other = compiled(model, 1)
    other.step(batch(0))
    other.load(tmp_path)
    assert plain.equal(other.state_dict(), pipe.state_dict())
