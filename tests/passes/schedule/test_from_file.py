"""A user's own schedule: text and CSV, torch's too; faults are named with their place."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipecompile.compiler.ir.actions import Kind, Schedule, to_text
from pipecompile.compiler.ir.errors import OptionError
from pipecompile.passes.schedule.communication import add_communication
from pipecompile.passes.schedule.from_file import file_kind, read_schedule
from pipecompile.passes.schedule.registry import SCHEDULES
from support.shapes import chain
from torch.distributed.pipelining import schedules as torchs

GOOD = "0F0 0F1 0B0 0W0 0B1 0W1\n1F0 1B0 1F1 1B1 1W0 1W1"


def made(name: str, ranks: int, microbatches: int) -> Schedule:
    kind = SCHEDULES[name]
    return kind.generate(kind.shape(ranks, microbatches))


@settings(max_examples=20)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_what_is_generated_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, name: str, ranks: int, m: int, whole: bool
) -> None:
    """Also with its sends and receives, which are left out."""
    schedule = made(name, ranks, m)
    n = 1 + max(action.stage for actions in schedule for action in actions)
    written = add_communication(schedule, chain(n)) if whole else schedule
    path = tmp_path_factory.mktemp("schedules") / "own.txt"
    path.write_text(to_text(written) + "\n")
    assert read_schedule(path) == schedule
    kind = file_kind(path)
    usual = SCHEDULES[name].shape(ranks, m)
    assert kind.shape(ranks, m).homes == usual.homes
    assert kind.generate(usual) == schedule
    assert kind.splits_backward == SCHEDULES[name].splits_backward


@pytest.mark.parametrize(
    ("schedule", "ranks", "microbatches"),
    [
        (torchs.ScheduleInterleaved1F1B, 2, 4),
        (torchs.ScheduleInterleavedZeroBubble, 2, 4),
        (torchs.ScheduleZBVZeroBubble, 2, 4),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_torchs_own_files_are_read(
    tmp_path: Path, schedule: type, ranks: int, microbatches: int
) -> None:
    path = tmp_path / "torch.csv"
    order = torch_order(schedule, ranks, microbatches)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(order[rank] for rank in range(ranks))
    text = path.read_text()
    found = read_schedule(path)
    counts = {kind: sum(a.kind is kind for row in found for a in row) for kind in Kind}
    assert counts[Kind.F] == counts[Kind.B] == 2 * ranks * microbatches
    assert counts[Kind.W] == (2 * ranks * microbatches if "I" in text else 0)


def test_backwards_out_of_order_are_refused(tmp_path: Path) -> None:
    """As torch's breadth-first schedule has them: gradients would be added in another order."""
    path = tmp_path / "torch.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(torch_order(torchs.ScheduleLoopedBFS, 2, 4).values())
    with pytest.raises(OptionError, match=r"stage 0 runs B of microbatches \[3, 2, 1, 0\]"):
        read_schedule(path)


def torch_order(schedule: type, ranks: int, microbatches: int) -> dict[int, list[object]]:
    """What torch would run, without the processes that its constructor wants."""

    class Stage:
        has_backward, is_first, is_last = True, False, False
        group_size, num_stages, group_rank = ranks, 2 * ranks, 0
        submod = None

        def __init__(self, index: int) -> None:
            self.stage_index = index
            self.stage_index_to_group_rank = {s: s % ranks for s in range(2 * ranks)}

    mine = (0, 2 * ranks - 1) if "ZBV" in schedule.__name__ else (0, ranks)
    stages = [Stage(index) for index in mine]
    return dict(schedule(stages, microbatches, loss_fn=lambda a, b: a).pipeline_order)


def test_torchs_words(tmp_path: Path) -> None:
    """I is B, and B is B and W, wherever there is an I."""
    path = tmp_path / "own.csv"
    path.write_text("0F0,,0F1,0B0,0I1,0W1\n,1F0,1I0,1F1,1B1,1W0\n".replace("1B1,1W0", "1W0,1B1"))
    assert to_text(read_schedule(path)) == ("0F0 0F1 0B0 0W0 0B1 0W1\n1F0 1B0 1F1 1W0 1B1 1W1")
    path.write_text("0F0,0B0,0W0\n1F0,1B0,1W0\n")
    assert to_text(read_schedule(path)) == "0F0 0B0 0W0\n1F0 1B0 1W0"
    path.write_text("0F0,(0F1;0B0)OVERLAP_F_B,0B1,0REDUCE_GRAD\n")
    assert to_text(read_schedule(path)) == "0F0 0F1 0B0 0B1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("1B1 1W0", "1b1 1W0"), "line 2, cell 4: '1b1' is not an .*did you mean 1B1"),
        (GOOD.replace("0F1", "0X1"), "line 1, cell 2: '0X1' is not an action like 2F0: stage, F"),
        (GOOD.replace("0B1 ", ""), "stage 0 runs B of microbatches"),
        (GOOD.replace("1F1 1B1", "1B1 1F1"), "1B1|comes before"),
        (GOOD.replace("1W0", "1F0"), "stage 1 runs F of microbatches"),
        ("1F0 1B0\n0F0 0B0\n3F0 3B0", "stage"),
        ("0F0 0B0 2F0 2B0\n1F0 1B0", r"ranks hold \[2, 1\] stages"),
        ("1F0 1B0 0F0 0B0", "made|makes|reads"),
        ("\n", "there is no action"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.txt"
    path.write_text(text)
    with pytest.raises(OptionError, match=message) as caught:
        read_schedule(path)
    assert str(path) in str(caught.value)


def test_a_circle_of_waits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1")
    with pytest.raises(OptionError, match=r"own\.txt"):
        read_schedule(path)


def test_a_file_that_is_not_there_is_told_from_one_that_is(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("0F0,0B0\n")
    with pytest.raises(OptionError, match=r"no such file; did you mean '.*mine.csv'"):
        read_schedule(tmp_path / "mine.cvs")
    with pytest.raises(OptionError, match=r"no such file$"):
        read_schedule(tmp_path / "nowhere" / "x.csv")


def test_a_file_is_for_its_numbers_only(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text(GOOD)
    kind = file_kind(path)
    with pytest.raises(OptionError, match="is for 2 ranks, this run has 3: n_stages=2"):
        kind.shape(3, 2)
    with pytest.raises(OptionError, match="1 stages per rank, this run 2: virtual_stages=1"):
        kind.shape(2, 2, 2)
    with pytest.raises(OptionError, match="for 2 microbatches, this run has 4: microbatches=2"):
        kind.generate(kind.shape(2, 4))


def test_programs_decide_where_w_is(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text(GOOD.replace(" 0W0", "").replace(" 0W1", ""))
    kind = file_kind(path)
    assert to_text(kind.generate(kind.shape(2, 2, splits=[True, False]))) == (
        "0F0 0F1 0B0 0W0 0B1 0W1\n1F0 1B0 1F1 1B1"
    )
