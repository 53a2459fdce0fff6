"""What compression has not sent is in checkpoints, and goes on under any division."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipecompile import errors
from support import checkpoints, compressing, plain
from support.compressing import METHODS
from support.gang import Gang
from support.matrix import quickly

TABLE = "compression"
OTHERS = [("int8", "adacomp:64"), ("powersgd:2", "powersgd:3")]  # methods, saved and loaded with


@pytest.mark.parametrize("method", quickly(["int8"], METHODS))
def test_a_resumed_run_has_the_bits_of_one_that_went_on(method: str, tmp_path: Path) -> None:
    losses, state, _ = compressing.save(str(tmp_path), method, 1, 2)
    again, found, kept = compressing.resume(str(tmp_path), method, 1, 2)
    assert plain.equal(again, losses)
    assert plain.equal(found, state)
    assert any(residue.any() for residue in kept.values())


@pytest.mark.parametrize("method", quickly(["powersgd:2"], METHODS))
def test_stages_may_be_others(method: str, tmp_path: Path) -> None:
    """Residues have names of parameters, and tied ones are on both stages."""
    losses, state, _ = compressing.save(str(tmp_path), method, 1, 2)
    again, found, _ = compressing.resume(str(tmp_path), method, 2, 2)
    assert plain.equal(again, losses)
    assert plain.equal(found, state)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_processes_save_what_one_loads(
    gang: Callable[[int], Gang], method: str, tmp_path: Path
) -> None:
    (losses, state, _), *_ = gang(4).run(compressing.save, str(tmp_path), method, 2, 2)
    again, found, _ = compressing.resume(str(tmp_path), method, 1, 2)
    assert plain.equal(again, losses)
    assert plain.equal(found, state)
    (again, found, _), *_ = gang(2).run(compressing.resume, str(tmp_path), method, 1, 2)
    assert plain.equal(again, losses)
    assert plain.equal(found, state)


@pytest.mark.parametrize(("before", "after"), quickly([OTHERS[0]], OTHERS))
def test_other_replicas_begin_with_the_mean_of_all(before: str, after: str, tmp_path: Path) -> None:
    """With another method too: what has not been sent is the same whatever sends it."""
    _, _, saved = compressing.save(str(tmp_path), before, 1, 2)
    _, _, kept = compressing.resume(str(tmp_path), after, 1, 4)
    assert {rank for rank, _ in kept} == {0, 1, 2, 3}
    for (_, name), residue in kept.items():
        mean = (saved[0, name] + saved[1, name]) / 2 if (0, name) in saved else 0 * residue
        assert torch.equal(residue, mean)


def test_without_compression_it_is_left_out_which_is_told(tmp_path: Path) -> None:
    compressing.save(str(tmp_path), "int8", 1, 2)
    with pytest.warns(UserWarning, match="compress= had not sent of gradients yet"):
        compressing.resume(str(tmp_path), "off", 1, 1)


def test_a_checkpoint_without_residues_begins_with_none(tmp_path: Path) -> None:
    compressing.save(str(tmp_path), "off", 1, 2)
    _, _, kept = compressing.resume(str(tmp_path), "int8", 1, 2)
    assert kept
    assert not any(residue.any() for residue in kept.values())


def test_another_training_begins_with_none() -> None:
    pipe = compressing.pipeline("powersgd:2")
    weights = {name: tensor.clone() for name, tensor in pipe.state_dict().items()}
    share = compressing.shares(pipe, 1)[0]
    first = [pipe.step(share) for _ in range(3)]
    pipe.restart(weights)
    assert not any(residue.any() for residue in compressing.residues(pipe).values())
    assert plain.equal([pipe.step(share) for _ in range(3)], first)


def _no_replicas(fields: Any) -> None:
    fields["training"][TABLE]["replicas"] = 1


def _missing(fields: Any) -> None:
    next(iter(fields["training"][TABLE]["tensors"].values())).remove("residue_1")


def _strange(fields: Any) -> None:
    fields["training"][TABLE]["tensors"]["nothing"] = ["residue_0", "residue_1"]


def _unclaimed(fields: Any) -> None:
    fields["training"][TABLE] = None


CHANGES = [_no_replicas, _missing, _strange, _unclaimed]


@pytest.mark.parametrize("change", quickly([_missing], CHANGES))
def test_what_cannot_have_been_saved_is_refused(
    change: Callable[[Any], None], tmp_path: Path
) -> None:
    compressing.save(str(tmp_path), "int8", 1, 2)
    pipe = compressing.pipeline("int8")
    before = pipe.state_dict()
    checkpoints.edit(next(tmp_path.glob("step-*")), change)
    with pytest.raises(errors.CheckpointError, match="damaged"):
        pipe.load(str(tmp_path))
    assert plain.equal(pipe.state_dict(), before)
