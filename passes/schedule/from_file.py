"""A user's own schedule, from a file.

Text, as `compiler.ir.actions.to_text` writes it: a line per rank, with actions between spaces.

    0F0 0F1 0B0 0W0 0B1 0W1
    1F0 1B0 1F1 1B1 1W0 1W1

CSV, as torch.distributed.pipelining writes and reads it with ``format="compute_only"``: a row per
rank, and a cell per step, which may be empty. Where an ``I`` stands in it, it is in torch's words:
``I`` is what B is here, and ``B`` is B and W.

Only computations are taken: what is sent, received and reduced, the compiler knows itself.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from ...compiler.ir.actions import Action, Kind, Phase, Schedule, homes_of
from ...compiler.ir.errors import OptionError, VerificationError
from ...compiler.ir.program import Message
from ..generators.shape import Homes, PipelineShape
from .communication import add_communication
from .registry import SCHEDULES, ScheduleKind
from .verify import verify_compute, verify_schedule

_COMPUTES = re.compile(r"(?P<stage>\d+)(?P<word>[FIBW])(?P<microbatch>\d+)")
_OTHER = re.compile(
    r"\d+((SEND|RECV)_[FB]\d+([→←]\d+)?|UNSHARD|RESHARD|REDUCE_GRAD|REDUCE_[BW]\d+|SYNC_TIED)"
)
_TOGETHER = re.compile(r"\((?P<parts>.*)\)OVERLAP_F_B")
Word = tuple[int, str, int]
"""(stage, F, I, B or W, microbatch)"""


def file_kind(path: str | Path) -> ScheduleKind:
    """The schedule of a file, to be used like those that have a name.

    It fits runs with its number of ranks, stages per rank and microbatches. Stages whose program
    has no W do not run those of the file, for their B does all; where a program has W, and the
    file has none for that stage, W follows B.

    Raises:
        OptionError: the file cannot be read, or is not a legal schedule.
    """
    schedule = read_schedule(path)
    homes = tuple(homes_of(schedule)[s] for s in range(len(homes_of(schedule))))
    virtual = len(homes) // len(schedule)
    return ScheduleKind(
        str(path),
        f"the order in {path}",
        partial(_generated, str(path), schedule, homes),
        splits_backward=any(a.kind is Kind.W for actions in schedule for a in actions),
        place=partial(_placed, str(path), homes),
        virtual=(virtual,),
        usual_virtual=virtual,
        fixed=True,
    )


def kind_of(name: str) -> ScheduleKind:
    """The schedule of a name, or of a file.

    Raises:
        OptionError: there is none, or the file is not a legal schedule.
    """
    if name in SCHEDULES:
        return SCHEDULES[name]
    if Path(name).suffix or len(Path(name).parts) > 1:
        return file_kind(name)
    near = get_close_matches(name, SCHEDULES, 1)
    use = f"did you mean {near[0]!r}?" if near else f"use {' or '.join(map(repr, SCHEDULES))}"
    raise OptionError(f"schedule={name!r}: {use} A file's name has a suffix, such as .csv")


def read_schedule(path: str | Path) -> Schedule:
    """The compute actions in a file.

    Raises:
        OptionError: the file cannot be read, or is not a legal schedule.
    """
    where = f"schedule={str(path)!r}"
    rows = [list(row) for row in _words(Path(path), where)]
    while rows and not rows[-1]:
        rows.pop()
    if not any(rows):
        raise OptionError(f"{where}: there is no action in the file")
    torchs = any(word == "I" for row in rows for _, word, _ in row)
    schedule = tuple(tuple(_actions(row, torchs)) for row in rows)
    _check(schedule, where)
    return schedule


def _words(path: Path, where: str) -> Iterator[Iterator[Word]]:
    """Per rank, what it does."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = [each.name for each in path.parent.glob("*")] if path.parent.is_dir() else []
        near = get_close_matches(path.name, names, 1)
        hint = f"; did you mean {str(path.parent / near[0])!r}?" if near else ""
        raise OptionError(f"{where}: there is no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"{where}: the file cannot be read: {error}") from None
    lines = text.splitlines()
    commas = path.suffix.lower() == ".csv" or "," in text
    for number, cells in enumerate(csv.reader(lines) if commas else map(str.split, lines), 1):
        yield (
            word
            for column, cell in enumerate(cells, 1)
            for word in _parsed(cell.strip(), f"{where}, line {number}, cell {column}")
        )


def _parsed(cell: str, where: str) -> Iterator[Word]:
    if together := _TOGETHER.fullmatch(cell):
        for part in together["parts"].split(";"):
            yield from _parsed(part.strip(), where)
    elif match := _COMPUTES.fullmatch(cell):
        yield int(match["stage"]), match["word"], int(match["microbatch"])
    elif cell and not _OTHER.fullmatch(cell):
        near = _COMPUTES.fullmatch(re.sub(r"\s", "", cell).upper())
        hint = f"; did you mean {near[0]}?" if near else ": stage, F, B or W, microbatch"
        raise OptionError(f"{where}: {cell!r} is not an action like 2F0{hint}")


def _actions(row: Sequence[Word], torchs: bool) -> Iterator[Action]:
    for stage, word, microbatch in row:
        whole = torchs and word == "B"
        yield Action(stage, Kind.B if word == "I" else Kind(word), microbatch)
        if whole:
            yield Action(stage, Kind.W, microbatch)


def _check(schedule: Schedule, where: str) -> None:
    """It is legal between neighbours, and ranks hold equally many stages."""
    counts = [len({action.stage for action in actions}) for actions in schedule]
    if len(set(counts)) > 1:
        raise OptionError(f"{where}: ranks hold {counts} stages: each must hold as many")
    last = max(action.stage for actions in schedule for action in actions)
    microbatches = 1 + max(a.microbatch or 0 for actions in schedule for a in actions)
    there = [Message(s, s + 1, Phase.FORWARD, ()) for s in range(last)]
    back = [Message(s + 1, s, Phase.BACKWARD, ()) for s in range(last)]
    messages = [*there, *back]
    if set(homes_of(schedule)) != set(range(last + 1)):
        raise OptionError(f"{where}: only stages {sorted(homes_of(schedule))} have actions")
    try:
        verify_compute(schedule, messages, microbatches, True)
        verify_schedule(add_communication(schedule, messages), messages, microbatches, True)
    except VerificationError as error:
        raise OptionError(f"{where}: {error}") from None


def _placed(name: str, homes: Homes, ranks: int, virtual: int) -> Homes:
    if (found := max(homes) + 1) != ranks:
        raise OptionError(
            f"schedule={name!r} is for {found} ranks, this run has {ranks}: n_stages={found}"
        )
    if (held := len(homes) // ranks) != virtual:
        raise OptionError(
            f"schedule={name!r} has {held} stages per rank, this run {virtual}: "
            f"virtual_stages={held}"
        )
    return homes


def _generated(name: str, schedule: Schedule, homes: Homes, shape: PipelineShape) -> Schedule:
    if shape.homes != homes:
        _placed(name, homes, shape.ranks, shape.virtual)
        raise OptionError(f"schedule={name!r} has its stages on ranks {homes}, not {shape.homes}")
    found = 1 + max(action.microbatch or 0 for action in schedule[0])
    if found != shape.microbatches:
        raise OptionError(
            f"schedule={name!r} is for {found} microbatches, this run has {shape.microbatches}: "
            f"microbatches={found}"
        )
    return tuple(tuple(_with_weights(actions, shape.splits)) for actions in schedule)


def _with_weights(actions: Sequence[Action], splits: Sequence[bool]) -> Iterator[Action]:
    """W for those stages that have one."""
    apart = {action.stage for action in actions if action.kind is Kind.W}
    for action in actions:
        if action.kind is not Kind.W or splits[action.stage]:
            yield action
        if action.kind is Kind.B and splits[action.stage] and action.stage not in apart:
            yield Action(action.stage, Kind.W, action.microbatch)
