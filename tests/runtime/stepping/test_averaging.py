"""Averages of the weights are those of torch's `AveragedModel`, whatever the division."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pipecompile.errors import OptionError, StateError
from support import jobs, models, plain
from support.gang import Gang
from support.matrix import quickly
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

BATCHES = models.batches("gpt2", 8, 6)
KINDS: dict[str, dict[str, Any]] = {
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
    "one": {"avg_fn": get_ema_avg_fn(0.8)},
    "mean": {},
}
EMA = KINDS["ema"]["multi_avg_fn"]


def compiled(n_stages: int, dp: int, **options: Any) -> Any:
    pipe = jobs.pipeline("gpt2", n_stages, dp, 4 // dp, **options)
    pipe.compile_for(plain.cut(BATCHES[0], pipe.data_shards)[0])
    return pipe


def steps(pipe: Any, average: Any, first: int, last: int) -> None:
    for batch in BATCHES[first:last]:
        pipe.step(plain.cut(batch, pipe.data_shards)[pipe.data_shard])
        average.update()


def seen(pipe: Any, average: Any) -> Any:
    """The weights, and inside the averages and their loss."""
    share = plain.cut(BATCHES[0], pipe.data_shards)[pipe.data_shard]
    before, own = pipe.state_dict(), pipe.evaluate(share)
    with average.swapped():
        averaged, loss = pipe.state_dict(), pipe.evaluate(share)
    assert plain.equal(pipe.state_dict(), before)
    assert torch.equal(pipe.evaluate(share), own)
    return before, averaged, loss


def trained(n_stages: int, dp: int, kind: str, folder: Path | None = None, **options: Any) -> Any:
    pipe = compiled(n_stages, dp, **options)
    average = pipe.averaged(**KINDS[kind])
    steps(pipe, average, 0, 3)
    if folder is not None:
        pipe.save(folder)
    steps(pipe, average, 3, 5)
    return seen(pipe, average)


def resumed(n_stages: int, dp: int, kind: str, folder: Path, **options: Any) -> Any:
    pipe = compiled(n_stages, dp, **options)
    average = pipe.averaged(**KINDS[kind])
    assert pipe.load(folder) == 3
    assert average.n_averaged == 3
    steps(pipe, average, 3, 5)
    return seen(pipe, average)


def plainly(kind: str, microbatches: int = 4) -> Any:
    model = models.build("gpt2")
    averaged = AveragedModel(model, **KINDS[kind])
    optimizer = jobs.OPTIMIZERS["adamw"](model.parameters())
    for batch in BATCHES[:5]:
        plain.accumulate(model, batch, 1, microbatches)
        optimizer.step()
        averaged.update_parameters(model)
    model.eval()
    averaged.module.eval()
    with torch.no_grad():
        pieces = plain.cut(BATCHES[0], microbatches)
        loss = torch.stack([averaged.module(**piece).loss for piece in pieces]).mean()
    return dict(model.state_dict()), dict(averaged.module.state_dict()), loss


@pytest.mark.parametrize(
    ("n_stages", "kind"), quickly([(2, "ema"), (1, "mean")], [(2, "ema"), (1, "mean"), (3, "one")])
)
def test_the_bits_of_torchs_averaged_model(n_stages: int, kind: str) -> None:
    found, expected = trained(n_stages, 1, kind), plainly(kind)
    assert plain.equal(found, expected)
    assert not plain.equal(found[0], found[1])


@pytest.mark.parametrize("zero", quickly([3], [0, 1, 2, 3]))
def test_in_processes_under_every_level(gang: Callable[[int], Gang], zero: int) -> None:
    """One process that plays all ranks has the same bits; they go on under another division."""
    expected = trained(1, 2, "ema", zero=zero)
    for found in gang(2).run(trained, 1, 2, "ema", zero=zero):
        assert plain.equal(found, expected)
    for one, other in zip(expected[1].values(), plainly("ema")[1].values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("zero", quickly([1], [1, 2, 3]))
def test_saved_and_resumed(tmp_path: Path, gang: Callable[[int], Gang], zero: int) -> None:
    """By replicas that divide everything, and opened by stages."""
    expected = gang(2).run(trained, 1, 2, "ema", tmp_path / "rows", zero=zero)[0]
    for found in gang(2).run(resumed, 1, 2, "ema", tmp_path / "rows", zero=zero):
        assert plain.equal(found, expected)
    taken = resumed(2, 1, "ema", tmp_path / "rows")  # adds up in another order from there
    for one, other in zip(taken[1].values(), expected[1].values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


@pytest.mark.slow
def test_saved_by_stages_and_resumed(tmp_path: Path, gang: Callable[[int], Gang]) -> None:
    whole = trained(2, 1, "ema", tmp_path)
    assert plain.equal(resumed(1, 1, "ema", tmp_path), whole)
    for found in gang(2).run(resumed, 2, 1, "ema", tmp_path):
        assert plain.equal(found, whole)


@pytest.mark.slow
def test_the_trained_weights_are_fp32_also_in_mixed_precision() -> None:
    before, averaged, _ = trained(2, 1, "ema", precision="bf16_params")
    assert {value.dtype for value in averaged.values()} == {torch.float32}
    assert not plain.equal(before, averaged)


def test_it_goes_into_a_model() -> None:
    pipe = compiled(2, 1)
    average = pipe.averaged(EMA)
    steps(pipe, average, 0, 2)
    with average.swapped():
        model = pipe.load_into(models.build("gpt2"))
        expected = pipe.state_dict()
    assert plain.equal(dict(model.state_dict()), expected)


def test_what_has_no_place_inside(tmp_path: Path) -> None:
    pipe = compiled(2, 1)
    average, other = pipe.averaged(EMA), pipe.averaged(name="mean")
    with pytest.raises(StateError, match="before the first update"), average.swapped():
        pass
    steps(pipe, average, 0, 1)
    other.update()
    pipe.save(tmp_path)
    calls: list[Callable[[], Any]] = [
        lambda: pipe.step(BATCHES[0]),
        lambda: pipe.forward_backward(BATCHES[0]),
        lambda: pipe.save(tmp_path),
        lambda: pipe.load(tmp_path),
        lambda: pipe.load_state_dict(pipe.state_dict()),
        average.update,
        lambda: contextlib.ExitStack().enter_context(other.swapped()),
    ]
    state = pipe.state_dict()
    with average.swapped():
        for call in calls:
            with pytest.raises(StateError, match="in the place of the weights"):
                call()
    with pytest.raises(ZeroDivisionError), average.swapped():
        raise ZeroDivisionError
    assert plain.equal(pipe.state_dict(), state)
    steps(pipe, average, 1, 2)


def by_norm(averages: Any, params: Any, count: Any) -> None:
    for average, param in zip(averages, params, strict=True):
        average.lerp_(param, float(1 / (1 + param.norm())))


def by_all(averages: Any, params: Any, count: Any) -> None:
    total = sum(float(param.sum()) for param in params)
    for average in averages:
        average.mul_(1 + total)


def test_averages_that_look_at_other_elements() -> None:
    pipe = compiled(2, 1)
    for odd in (by_norm, by_all):
        with pytest.raises(OptionError, match="average each element alone"):
            pipe.averaged(odd)
    with pytest.raises(OptionError, match="no effect beside"):
        pipe.averaged(EMA, avg_fn=get_ema_avg_fn(0.9))
    with pytest.raises(OptionError, match="is not callable"):
        pipe.averaged(0.999)
    pipe.averaged(EMA)
    with pytest.raises(OptionError, match="has a 'averaged' already"):
        pipe.averaged(EMA)


@pytest.mark.slow
def test_frozen_parameters_have_no_average() -> None:
    model = models.build("gpt2")
    model.transformer.wpe.weight.requires_grad_(False)
    pipe = jobs.pipecompile.compile(
        model,
        2,
        microbatches=2,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        example_batch=BATCHES[0],
    )
    average = pipe.averaged(EMA)
    pipe.step(BATCHES[0])
    average.update()
    assert len(average.state) == len([p for p in pipe.parameters() if p.requires_grad])
    with average.swapped():
        state = pipe.state_dict()
    assert torch.equal(state["transformer.wpe.weight"], model.transformer.wpe.weight)
