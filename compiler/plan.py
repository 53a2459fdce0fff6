"""All decisions of a compilation as data: what `inspect` shows and `pipe.plan` returns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PLAN_VERSION = 1


@dataclass(frozen=True)
class Transfer:
    """What one stage sends to another per microbatch."""

    dst: int
    phase: str
    bytes: int
    values: tuple[str, ...]


@dataclass(frozen=True)
class StagePlan:
    """One stage: what it covers, what it costs per microbatch, what it keeps and sends.

    Seconds are the roofline's (`compiler.cost`) and include what forward and backward move.
    """

    stage: int
    modules: tuple[str, ...]
    units: int
    params: tuple[str, ...]
    param_count: int
    param_bytes: int
    forward_flops: int
    backward_flops: int
    forward_s: float
    backward_s: float
    stash_bytes: int
    carry_bytes: int
    in_flight: int
    constant_bytes: int
    sends: tuple[Transfer, ...]


@dataclass(frozen=True)
class TiedPlan:
    """A parameter that several stages hold."""

    name: str
    names: tuple[str, ...]
    stages: tuple[int, ...]
    owner: int
    bytes: int
    summed: str


@dataclass(frozen=True)
class Plan:
    """A compiled pipeline, as data.

    Attributes:
        shape: leaves of one microbatch, as text.
        device: whose peak rates (`compiler.hardware`) the seconds are.
        fingerprint: of the joint graph; two ranks must agree on it.
        schedule: one line of actions per stage.
        param_count: of the model; a parameter that several stages hold counts once.
        step_s, bubble: of the simulated schedule.
        notes: what each pass did.
    """

    model: str
    n_stages: int
    dp: int
    microbatches: int
    microbatch_rows: int
    shape: str
    device: str
    fingerprint: str
    param_count: int
    stages: tuple[StagePlan, ...]
    tied: tuple[TiedPlan, ...]
    schedule: tuple[str, ...]
    step_s: float
    bubble: float
    notes: tuple[tuple[str, str], ...]
    version: int = PLAN_VERSION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        """Sorted keys, two spaces, a newline at the end: equal plans are equal bytes."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def covered_modules(
    here: Sequence[str], everywhere: Sequence[Sequence[str]], stage: int
) -> tuple[str, ...]:
    """Module paths of one stage, shortened.

    A module all of whose operators are on the stage stands for everything inside it, and runs of
    numbered siblings become ranges: ``transformer.h.0–4``.

    Args:
        here: the stage's module path per node.
        everywhere: the same for every stage.
    """
    elsewhere = {
        prefix
        for s, paths in enumerate(everywhere)
        if s != stage
        for path in set(paths)
        for prefix in _prefixes(path)
    }
    shown: dict[str, None] = {}
    for path in dict.fromkeys(here):
        whole = next((p for p in _prefixes(path) if p and p not in elsewhere), None)
        if whole is not None:
            shown[whole] = None
    if not shown:  # only operators between modules
        shown = dict.fromkeys(path or "(model)" for path in here)
    return _ranges(list(shown))


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return ["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]


def _ranges(paths: list[str]) -> tuple[str, ...]:
    result: list[str] = []
    run: list[int] = []
    stem = ""
    for path in [*paths, ""]:
        head, _, tail = path.rpartition(".")
        if run and head == stem and tail.isdigit() and int(tail) == run[-1] + 1:
            run.append(int(tail))
            continue
        if run:
            result.append(f"{stem}.{run[0]}" + (f"–{run[-1]}" if len(run) > 1 else ""))
            run = []
        if tail.isdigit():
            stem, run = head, [int(tail)]
        elif path:
            result.append(path)
    return tuple(result)
