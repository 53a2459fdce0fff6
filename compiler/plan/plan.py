"""All decisions of a compilation as data: what `inspect` shows and `pipe.plan` returns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..ir.actions import placement_of
from ..ir.errors import PlanError
from .decision import Decision
from .writing import write_whole

PLAN_VERSION = 9
TRIED = "tried"
"""What `inspect --json` may have beside a plan's fields; plans are read without it."""


@dataclass(frozen=True)
class Transfer:
    """What one stage sends to another per microbatch."""

    dst: int
    phase: str
    bytes: int
    values: tuple[str, ...]


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes of one rank (`compiler.memory.rank_memory`).

    Attributes:
        copies: of weights, in the compute dtype.
        states: of the optimizer.
        batch: of the rank's share of the batch.
        peak, peak_at: the most at once, and the action that needs it.
        residue: what compression has not sent yet of gradients.
        device: what its device takes for itself, where that counts; not in the peak.
    """

    weights: int
    copies: int
    grads: int
    states: int
    buffers: int
    constants: int
    batch: int
    peak: int
    peak_at: str
    residue: int = 0
    device: int = 0

    @property
    def needed(self) -> int:
        """Of the memory that there is."""
        return self.peak + self.device


@dataclass(frozen=True)
class StagePlan:
    """One stage: what it covers, what it costs per microbatch, what it keeps and sends.

    Attributes:
        rank: of a replica, that holds it.
        forward_s, backward_s, recompute_s: predicted; the backward without recomputation.
        recomputes: what is recomputed -> in how many of the stage's units.
        closing_s: once per step, after the last microbatch: the optimizer of its rank.
        memory: of its rank.
        sends: to stages of other ranks.
        exchanged_bytes: what its rank gives other replicas of its gradients once per step; None
            where they divide these.
        device: the name of that of its rank; "" where all are the plan's.
        budget_bytes: memory of its rank, where ranks have not all the plan's.
    """

    stage: int
    rank: int
    modules: tuple[str, ...]
    units: int
    params: tuple[str, ...]
    param_count: int
    param_bytes: int
    forward_flops: int
    backward_flops: int
    recompute_flops: int
    forward_s: float
    backward_s: float
    recompute_s: float
    closing_s: float
    recomputes: dict[str, int]
    stash_bytes: int
    carry_bytes: int
    in_flight: int
    memory: MemoryPlan
    sends: tuple[Transfer, ...]
    exchanged_bytes: int | None = None
    device: str = ""
    budget_bytes: int | None = None


@dataclass(frozen=True)
class TiedPlan:
    """A parameter that several stages hold.

    Attributes:
        bytes: of its gradient.
        part_bytes: of what another stage than the owner adds to it, as it is sent.
    """

    name: str
    names: tuple[str, ...]
    stages: tuple[int, ...]
    owner: int
    bytes: int
    part_bytes: int
    summed: str


@dataclass(frozen=True)
class Plan:
    """A compiled pipeline, as data.

    Attributes:
        shape: leaves of one microbatch, as text.
        microbatch_tokens: token ids in it; 0 for other inputs.
        device, costs: what the seconds are of: a device (`compiler.costs.hardware`) and
            "roofline", "calibrated" or "profile".
        n_stages: ranks of a replica; ``stages`` are as many times ``virtual_stages``.
        budget_bytes: memory of a rank, None for no limit; of the one that has least.
        decision: stages and recomputation; enough to make the same programs again.
        schedule: one line of actions per rank.
        options: those that the programs depend on.
        param_count: of the model; a parameter that several stages hold counts once.
        step_s, bubble: of the simulated schedule.
        notes: what each pass did.
    """

    model: str
    n_stages: int
    virtual_stages: int
    dp: int
    microbatches: int
    microbatch_rows: int
    shape: str
    microbatch_tokens: int
    device: str
    costs: str
    budget_bytes: int | None
    param_count: int
    options: dict[str, str]
    decision: Decision
    stages: tuple[StagePlan, ...]
    tied: tuple[TiedPlan, ...]
    schedule: tuple[str, ...]
    step_s: float
    bubble: float
    notes: tuple[tuple[str, str], ...]
    version: int = PLAN_VERSION

    @property
    def training(self) -> bool:
        """Whether it is of a pipeline that trains."""
        return self.options.get("training") != str(False)

    @property
    def ranks(self) -> tuple[tuple[StagePlan, ...], ...]:
        """Per rank of a replica, its stages in order."""
        placement = placement_of([stage.rank for stage in self.stages])
        return tuple(tuple(self.stages[stage] for stage in stages) for stages in placement)

    @property
    def by_device(self) -> bool:
        """Whether ranks may use all that their devices have."""
        return any(each.budget_bytes is not None or each.memory.device for each in self.stages)

    def limit_of(self, stage: StagePlan) -> int | None:
        """Bytes of memory that its rank has; None for no limit."""
        return self.budget_bytes if stage.budget_bytes is None else stage.budget_bytes

    @property
    def fullest(self) -> StagePlan:
        """A stage of the rank that has least to spare; of those without limits, that needs most."""
        if self.budget_bytes is None:
            return max(self.stages, key=lambda stage: stage.memory.needed)
        return min(self.stages, key=lambda each: (self.limit_of(each) or 0) - each.memory.needed)

    @property
    def fingerprint(self) -> str:
        """Of the joint graph; two ranks must agree on it."""
        return self.decision.fingerprint

    def to_dict(self) -> dict[str, Any]:
        """As plain data; how long the search took is left out, so that equal plans are equal."""
        made = asdict(self)
        del made["decision"]["search"]["seconds"]
        return made

    def to_json(self, tried: Sequence[Mapping[str, Any]] = ()) -> str:
        """Sorted keys, two spaces, a newline at the end: equal plans are equal bytes.

        Args:
            tried: the ways among which this one was chosen; they stand beside the plan's fields.
        """
        made = self.to_dict() | ({TRIED: list(tried)} if tried else {})
        return json.dumps(made, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the JSON; a file that is there is replaced whole or not at all."""
        write_whole(Path(path), [self.to_json()])

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read what `save` wrote.

        Raises:
            PlanError: no such file, not a plan, or one of another version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"cannot read the plan {str(path)!r}: {error}") from error
        return Plan.from_json(text, str(path))

    @staticmethod
    def from_json(text: str, name: str = "plan") -> Plan:
        """The plan that `to_json` wrote; ``name`` is for messages."""
        try:
            given = json.loads(text)
        except ValueError as error:
            raise PlanError(f"{name} is damaged: {error}; make a new plan") from error
        if not isinstance(given, dict) or "version" not in given:
            raise PlanError(f"{name} is not a plan: it has no 'version'")
        if given["version"] != PLAN_VERSION:
            raise PlanError(
                f"{name} has version {given['version']}, this pipecompile reads {PLAN_VERSION}: "
                "make a new plan"
            )
        given.pop(TRIED, None)
        try:
            plan: Plan = made(Plan, given)
            plan.decision.check(plan.n_stages * plan.virtual_stages)
        except (TypeError, ValueError, KeyError) as error:
            raise PlanError(f"{name} is damaged: {error}; make a new plan") from error
        return plan


def made(wanted: Any, value: Any, where: str = "plan") -> Any:
    """Plain data -> the dataclass, tuple or dict that a type says, checked on the way.

    Raises:
        TypeError: the data has another type, or fields are missing or unknown.
    """
    origin, inner = get_origin(wanted), get_args(wanted)
    if isinstance(wanted, type) and is_dataclass(wanted):
        if not isinstance(value, dict):
            raise TypeError(f"{where} is {value!r}")
        types = get_type_hints(wanted)
        fields_ = {f.name: f for f in fields(wanted)}
        odd = set(value) ^ set(fields_) - {n for n, f in fields_.items() if _optional(f)}
        if odd - {n for n, f in fields_.items() if _optional(f)}:
            raise TypeError(f"{where} lacks or has too many of {', '.join(sorted(odd))}")
        return wanted(**{k: made(types[k], v, f"{where}.{k}") for k, v in value.items()})
    if origin is tuple and isinstance(value, list):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(
            made(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict and isinstance(value, dict):
        return {k: made(inner[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if origin in (tuple, dict):
        raise TypeError(f"{where} is {value!r}")
    accepted = tuple(inner) if inner else (wanted,)
    if float in accepted and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
        raise TypeError(f"{where} is {value!r}")
    return value


def _optional(field: Field[Any]) -> bool:
    return field.default is not MISSING


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
