"""Values between stages in fewer bits: what becomes of them, of their bytes, and of a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pipecompile
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipecompile import Precision, errors
from pipecompile.compiler.compression.rows import from_int8, packed_nbytes, saves, to_int8
from support import compressing, models, plain
from support.gang import Gang
from support.matrix import quickly
from torch import nn

SHAPES = st.lists(st.integers(1, 5), max_size=2).map(lambda outer: (*outer, 24))


@given(SHAPES, st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_rows_come_back_with_half_a_step_at_most(
    shape: tuple[int, ...], dtype: torch.dtype, turned: bool
) -> None:
    value = torch.randn(shape).to(dtype)
    if turned and value.dim() > 1:
        value = torch.randn(shape[::-1]).to(dtype).permute(*range(value.dim())[::-1])
    packed = to_int8(value)
    assert packed.nbytes == packed_nbytes(value)
    assert packed.nbytes < value.nbytes or not saves(value)
    back = from_int8(packed, value.stride(), dtype)
    assert back.stride() == value.stride()
    assert back.dtype is dtype
    step = value.float().abs().amax(-1, keepdim=True) / 127
    most = 0.51 * step + 2**-8 * value.float().abs() * (dtype is torch.bfloat16)
    assert ((back.float() - value.float()).abs() <= most + 1e-12).all()


def test_rows_without_numbers_and_rows_that_are_not_finite() -> None:
    value = torch.zeros(3, 8)
    value[1, 2], value[2, 5] = torch.inf, torch.nan
    back = from_int8(to_int8(value), (8, 1), torch.float32)
    assert torch.equal(back[0], value[0])
    assert not back[1].isfinite().all()
    assert not back[2].isfinite().all()


def sends(plan: Any) -> int:
    return sum(message.bytes for stage in plan.stages for message in stage.sends)


@pytest.mark.parametrize(("method", "times"), [("bf16", 2), ("int8", 3)])
def test_messages_are_as_much_smaller_as_the_plan_says(method: str, times: int) -> None:
    """Parts of tied gradients, which are sums, stay as they are."""
    options: dict[str, Any] = {"tied_grads": "per_step"}
    pipes = [compressing.pipeline(how, 2, 1, **options) for how in ("off", {"values": method})]
    whole, less = (sends(pipe.plan) for pipe in pipes)
    assert whole / less > times * 0.99
    dtypes = {v.dtype for m in pipes[1].programs.messages for v in m.values if len(v.shape) > 1}
    assert dtypes <= {torch.bfloat16 if method == "bf16" else torch.int8, torch.int64, torch.bool}


@pytest.mark.slow
@pytest.mark.parametrize("method", quickly(["int8"], ["int8", "bf16"]))
def test_processes_have_the_bits_of_one(gang: Callable[[int], Gang], method: str) -> None:
    how = {"values": method, "gradients": "int8"}
    mine = compressing.train(how, 2, 2)
    for losses, state, *_ in gang(4).run(compressing.train, how, 2, 2):
        assert plain.equal(losses, mine[0])
        assert plain.equal(state, mine[1])


@pytest.mark.parametrize("method", ["int8", "bf16"])
def test_training_is_near_to_what_it_is_without(method: str) -> None:
    found, exact = (compressing.train(how, 3, 1) for how in ({"values": method}, "off"))
    gaps = [abs(a - b).item() for a, b in zip(found[0], exact[0], strict=True)]
    assert 0 < max(gaps) < 0.02


@pytest.mark.slow
def test_narrow_values_are_rounded_further_in_int8() -> None:
    pipes = [
        compressing.pipeline(how, 2, 1, precision="bf16_params")
        for how in ("off", {"values": "int8"})
    ]
    whole, less = (sends(pipe.plan) for pipe in pipes)
    assert less < whole


class Narrow(nn.Module):
    """One number a row crosses, which would have a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 1), nn.Linear(1, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.second(self.first(x)).square().mean()}


def test_values_that_cannot_be_smaller_are_told() -> None:
    with pytest.raises(errors.OptionError, match="no effect on this model: no value that crosses"):
        pipecompile.compile(
            Narrow(), 2, compress={"values": "int8"}, pin={"first": 0, "second": 1},
            example_batch=torch.ones(4, 8),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"verify": 1}, "rounds what travels"),
        (
            {"precision": Precision(compute=torch.bfloat16, boundary=torch.bfloat16)},
            "both say in which",
        ),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(errors.OptionError, match=said):
        pipecompile.compile(models.build("gpt2"), 2, compress={"values": "int8"}, **options)


@pytest.mark.slow
def test_inference_sends_fewer_bytes_too() -> None:
    found, sent = [], []
    for how in ("off", {"values": "int8"}):
        pipe = pipecompile.compile(models.build("gpt2"), 2, compress=how, training=False)
        found.append(pipe.forward(models.batches("gpt2", 4, 1)[0]).logits)
        sent.append(sends(pipe.plan))
    assert sent[1] < sent[0]
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=0.2, atol=0.05)
