"""What cannot be loaded changes nothing: not on the rank that finds it out, not on another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pipecompile import errors
from pipecompile.runtime.checkpoint.restore import Restore
from pipecompile.runtime.state import state_dict as state_dicts
from support.checkpoints import (
    LR_SCHEDULER,
    OPTIMIZERS,
    PART,
    Position,
    edit,
    optimizer_states,
    pipeline,
    refused,
    rows,
    small,
    steps,
)
from support.gang import Gang
from support.plain import equal
from torch import nn

STEP = "step-00000001"


class Refusing(Position):
    """Takes half of what it is given."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]
        raise ValueError("no more")


class Deep(Position):
    """Its state is in what it holds, and changed there; takes only what it has had."""

    def __init__(self) -> None:
        super().__init__([0])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at[:] = state["at"]
        if state["at"] != [0]:
            raise ValueError("no more")


def trained(n_stages: int, step: int) -> Any:
    pipe = small(n_stages, OPTIMIZERS["adam"], lr_scheduler=LR_SCHEDULER)
    pipe.step(rows(step))
    return pipe


def all_of(pipe: Any) -> Any:
    """Everything that loading changes, copied."""
    states = {n: {k: v.clone() for k, v in s.items()} for n, s in optimizer_states(pipe).items()}
    groups = [
        {k: v for k, v in group.items() if k != "params"} for group in pipe.optimizer.param_groups
    ]
    scheduler = {k: str(v) for k, v in pipe.lr_scheduler.state_dict().items()}
    counts = pipe._steps, pipe._seed, torch.get_rng_state()
    grads = [None if p.grad is None else p.grad.clone() for p in pipe.parameters()]
    return pipe.state_dict(), states, groups, scheduler, counts, grads


def refuse(extra: Any) -> Callable[[Any, pytest.MonkeyPatch, Path], None]:
    def act(pipe: Any, patch: pytest.MonkeyPatch, step: Path) -> None:
        pipe.checkpoint_extras["last"] = extra

    return act


def failing(which: str) -> Callable[[Any, pytest.MonkeyPatch, Path], None]:
    """Optimizer or scheduler, which fail once they have changed."""

    def act(pipe: Any, patch: pytest.MonkeyPatch, step: Path) -> None:
        kind, real = type(getattr(pipe, which)), getattr(pipe, which).load_state_dict

        def load(state: Any) -> None:
            real(state)
            raise RuntimeError("too late")

        patch.setattr(kind, "load_state_dict", lambda self, state: load(state))

    return act


def damaged(change: Callable[[Any], Any]) -> Callable[[Any, pytest.MonkeyPatch, Path], None]:
    return lambda pipe, patch, step: edit(step, change)


def last_byte(pipe: Any, patch: pytest.MonkeyPatch, step: Path) -> None:
    content = (step / PART).read_bytes()
    (step / PART).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


FAILURES: dict[str, Callable[[Any, pytest.MonkeyPatch, Path], None]] = {
    "extra": refuse(Refusing("mine")),
    "deep extra": refuse(Deep()),
    "optimizer": failing("optimizer"),
    "scheduler": failing("lr_scheduler"),
    "random": damaged(lambda f: f["training"]["random"][0].update(cpu={"$": "bytes", "data": ""})),
    "group": damaged(lambda f: f["training"]["optimizer"]["groups"][0].update(eps="x")),
    "data": damaged(lambda f: f["training"].update(data=[{"at": {"$": "nothing"}}])),
    "values": last_byte,
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_late_failure_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    saver = trained(2, 0)
    saver.checkpoint_extras |= {"first": Position("saved"), "last": Position([9])}
    saver.save(tmp_path, data=Position("there"))
    pipe = trained(1, 7)
    pipe.step(rows(8))
    pipe.forward_backward(rows(9))
    first, data = Position("as it was"), Position("here")
    pipe.checkpoint_extras["first"] = first
    FAILURES[name](pipe, monkeypatch, tmp_path / STEP)
    before, kept = all_of(pipe), str(vars(pipe.checkpoint_extras.get("last", first)))
    refused(lambda: pipe.load(tmp_path, data=data))
    assert equal(all_of(pipe), before)
    assert (first.at, data.at) == ("as it was", "here")
    assert str(vars(pipe.checkpoint_extras.get("last", first))) == kept
    monkeypatch.undo()
    pipe.step(rows(10))


def test_data_that_refuses_leaves_everything_as_it_was(tmp_path: Path) -> None:
    saver = trained(2, 0)
    saver.save(tmp_path, data=Position("there"))
    pipe, data = trained(1, 7), Refusing("here")
    before = all_of(pipe)
    said = refused(lambda: pipe.load(tmp_path, data=data))
    assert said == "data= does not take what was saved of it: ValueError: no more"
    assert equal(all_of(pipe), before)
    assert data.at == "here"


def one_refuses(directory: str) -> list[Any]:
    """Rank 1 alone finds the fault: in an extra, and in a file that only it reads."""
    pipe = pipeline(2, 1)
    steps(pipe, 0, 1)
    pipe.checkpoint_extras["each"] = Position("saved")
    pipe.save(directory)
    steps(pipe, 1, 2)
    here = Refusing if os.environ["RANK"] == "1" else Position
    pipe.checkpoint_extras["each"] = here("as it was")
    before = pipe.state_dict(), pipe.optimizer.state_dict(), pipe._steps
    said = [refused(partial(pipe.load, directory))]
    if os.environ["RANK"] == "1":
        pipe.checkpoint_extras["each"] = Position("as it was")
        part = Path(directory) / STEP / "part-00001.safetensors"
        content = part.read_bytes()
        part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said.append(refused(partial(pipe.load, directory)))
    same = equal((pipe.state_dict(), pipe.optimizer.state_dict(), pipe._steps), before)
    return [*said, same, pipe.checkpoint_extras["each"].at]


def test_what_one_rank_refuses_changes_no_other(
    gang: Callable[[int], Gang], tmp_path: Path
) -> None:
    for extra, values, same, at in gang(2).run(one_refuses, str(tmp_path)):
        assert "checkpoint_extras['each'] does not take what was saved of it" in extra
        assert "part-00001.safetensors is damaged: the values of" in values
        assert same
        assert at == "as it was"


LAST_PARTS = [["load"], ["load_state_dict", "restart"]]


def one_has_no_memory(directory: str, calls: Sequence[str]) -> list[Any]:
    """Rank 1 fails in the very last part, and goes on as if nothing was."""
    said: list[Any] = []
    for call in calls:
        pipe = pipeline(2, 1, timeout_s=60)
        pipe.save(f"{directory}/{call}")
        state = pipe.state_dict()
        owner, name = (Restore, "_spread_buffers") if call == "load" else (state_dicts, "put")
        with pytest.MonkeyPatch.context() as patch:
            if os.environ["RANK"] == "1":
                short = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
                patch.setattr(owner, name, short)
            begun_s = time.monotonic()
            with pytest.raises((errors.CheckpointError, errors.StateError)) as caught:
                getattr(pipe, call)(f"{directory}/{call}" if call == "load" else state)
        with pytest.raises(errors.PeerFailedError) as later:
            steps(pipe, 0, 1)
        said.append((str(caught.value), str(later.value), time.monotonic() - begun_s))
    return said


@pytest.mark.slow  # each begins processes of its own
@pytest.mark.parametrize("calls", LAST_PARTS, ids=" ".join)
def test_a_failure_in_the_last_part_is_told_by_who_has_it(
    tmp_path: Path, calls: Sequence[str]
) -> None:
    gang = Gang(2)
    try:
        for answers in gang.run(one_has_no_memory, str(tmp_path), calls):
            for call, (first, later, seconds) in zip(calls, answers, strict=True):
                assert f"{call}() failed while it changed the pipeline" in first
                assert "OutOfMemoryError: CUDA out of memory" in first
                assert "failed" in later
                assert seconds < 30
    finally:
        gang.close()


def test_a_failure_in_the_last_part_says_so_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And loading again makes it good."""
    saver, pipe = trained(2, 0), trained(1, 7)
    saver.save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Restore, "_spread_buffers", mock.Mock(side_effect=RuntimeError("no memory")))
        assert "load() failed while it changed the pipeline" in refused(lambda: pipe.load(tmp_path))
    assert pipe.load(tmp_path) == 1
    assert equal(pipe.state_dict(), saver.state_dict())
    pipe.step(rows(1))


# -- state dicts -------------------------------------------------------------------------------

BAD: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "shape": (lambda t: torch.ones(7), "has shape"),
    "int": (lambda t: t.int(), "is int32 in the state dict and float32 in the model"),
    "none": (lambda t: None, "is a NoneType in the state dict"),
    "meta": (lambda t: t.to("meta"), "has no values"),
    "freed": (lambda t: freed(t.clone()), "has no values in the state dict: its memory was freed"),
}


def freed(tensor: torch.Tensor) -> torch.Tensor:
    """As FSDP does with what it does not need; torch crashes where that is read."""
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize("name", BAD)
def test_a_bad_last_tensor_of_a_state_dict_changes_nothing(name: str) -> None:
    pipe = small(2, OPTIMIZERS["sgd"])
    before = pipe.state_dict()
    change, message = BAD[name]
    given = {n: t + 1 if t.is_floating_point() else t for n, t in before.items()}
    last = [n for n, t in given.items() if t.is_floating_point()][-1]
    with pytest.raises(errors.StateError, match=message) as caught:
        pipe.load_state_dict(given | {last: change(given[last])})
    assert repr(last) in str(caught.value)
    assert equal(pipe.state_dict(), before)
    pipe.load_state_dict({**given, last: given[last].to_sparse()})
    assert equal(pipe.state_dict(), given)


def one_has_a_bad_dict() -> tuple[str, bool]:
    pipe = pipeline(2, 1)
    before = pipe.state_dict()
    given = {name: tensor + 1 for name, tensor in before.items()}
    if os.environ["RANK"] == "1":
        given.pop(list(given)[-1])
        given.pop("transformer.ln_f.bias", None)
    with pytest.raises(errors.StateError) as caught:
        pipe.load_state_dict(given)
    return str(caught.value), equal(pipe.state_dict(), before)


def test_a_bad_state_dict_of_one_rank_changes_no_other(gang: Callable[[int], Gang]) -> None:
    for said, same in gang(2).run(one_has_a_bad_dict):
        assert "the state dict does not fit the model: missing ['transformer.ln_f.bias']" in said
        assert same


def test_parameters_that_somebody_holds_are_those_that_are_loaded(tmp_path: Path) -> None:
    saver, pipe = trained(2, 0), trained(1, 7)
    held: dict[str, nn.Parameter] = dict(pipe.named_parameters())
    saver.save(tmp_path)
    pipe.load(tmp_path)
    assert all(param is held[name] for name, param in pipe.named_parameters())
    assert equal(pipe.state_dict(), saver.state_dict())
