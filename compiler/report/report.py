"""A plan as text for people: with rich in a terminal, in plain columns when piped."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group, RenderableType
from rich.text import Text

from ...passes.schedule.registry import DEFAULT
from ..plan.plan import Plan
from . import tables
from .charts import bar, schedule_chart
from .quantities import (
    bytes_scale,
    bytes_text,
    count_scale,
    counted,
    flops_text,
    rate_text,
    seconds_scale,
    seconds_text,
)
from .texts import (
    fit_text,
    recomputed_text,
    sent_bytes,
    stage_seconds,
    tied_text,
    values_text,
    working_bytes,
)
from .ways import ways_of

if TYPE_CHECKING:
    from ...passes.schedule.simulate import Timeline
    from ..driver.auto import Trial
    from ..driver.record import PassRecord
    from .compare import Comparison

PLAIN_WIDTH = 80
LEAST_BAR = 5  # characters: a shorter one says nothing
_TIMES = {"highs": "HiGHS", "cbc": "CBC", "dynamic": "dynamic program"}


@dataclass(frozen=True)
class Extras:
    """What is said of a plan and does not stand in it.

    Attributes:
        search_s: how long the solver took; None for a plan that was made before.
        trials: divisions of the devices, of automatic stages.
        comparison: other strategies at the same prices, the plan's own first.
        hints: what a small change would bring.
        fp32: the same stages computed in fp32, beside a plan in mixed precision.
        passes: what each pass did, in order, to be shown with its time instead of the plan's
            notes.
        verdict: the whole report in a sentence, and warnings after it.
        searched: how the trials were come by; "" where nothing was searched.
    """

    search_s: float | None = None
    trials: tuple[Trial, ...] = ()
    comparison: tuple[Comparison, ...] = ()
    hints: tuple[str, ...] = ()
    fp32: Plan | None = None
    passes: tuple[PassRecord, ...] = ()
    verdict: tuple[str, ...] = ()
    searched: str = ""


def write_report(
    plan: Plan, timeline: Timeline, stream: TextIO, extras: Extras | None = None
) -> None:
    """Write everything that a plan says, as wide as the terminal."""
    plain = not stream.isatty()
    if not plain:
        console = Console(file=stream)
    else:
        console = Console(
            file=io.StringIO(), width=PLAIN_WIDTH, color_system=None, force_terminal=False
        )
    report = _Report(plan, timeline, extras or Extras(), console.width, plain)
    if not plain:
        for section in report.sections():
            console.print(section, "", sep="\n")
        return
    with console.capture() as captured:
        for section in report.sections():
            console.print(section, "", sep="\n")
    lines = [line.rstrip() for line in captured.get().rstrip().splitlines()]
    stream.write("\n".join(lines) + "\n")


class _Report:
    """The sections of a report."""

    def __init__(self, plan: Plan, timeline: Timeline, extras: Extras, width: int, plain: bool):
        self.plan, self.timeline, self.extras = plan, timeline, extras
        self.width, self.plain = width, plain

    def sections(self) -> Iterator[RenderableType]:
        plan, extras = self.plan, self.extras
        if extras.verdict:
            yield self._verdict(extras.verdict)
        yield self._lines(f"{plan.model}: {plan.param_count:,} parameters", self._header())
        if extras.trials:
            yield self._trials(extras.trials, extras.searched)
        yield self._stages()
        covered = [f"stage {s.stage}: {', '.join(s.modules)}" for s in plan.stages]
        yield self._lines("modules", covered)
        yield self._memory()
        again = [recomputed_text(stage) for stage in plan.stages if stage.recomputes]
        if again:
            yield self._lines("recomputed in the backward", again)
        if said := [note for name, note in plan.notes if name in ("chunks", "chunked_loss")]:
            yield self._lines("logits of the loss", said)
        if said := [note for name, note in plan.notes if name == "freezing"]:
            yield self._lines("frozen parameters", said)
        if extras.fp32:
            yield self._precision(extras.fp32)
        if plan.tied:
            yield self._lines("tied weights", [tied_text(tied, plan) for tied in plan.tied])
        if any(stage.sends for stage in plan.stages):
            yield self._transfers()
        yield schedule_chart(self.timeline, plan.microbatches, self.width)
        yield self._lines("totals", [*self._speed(), *self._amounts(), *self._origin()])
        if extras.comparison:
            yield self._comparison(extras.comparison)
        if extras.hints:
            yield self._lines("hints", extras.hints, mark="- ")
        if extras.passes:
            yield self._passes(extras.passes)
        else:
            yield self._lines("passes", [f"{name}: {note}" for name, note in plan.notes])

    # -- layout -------------------------------------------------------------------------------

    def _lines(self, title: str, lines: Sequence[str] = (), mark: str = "") -> Text:
        return tables.lines(title, lines, self.width, mark)

    def _table(self, columns: tables.Columns, left: Sequence[str] = ()) -> RenderableType:
        return tables.table(columns, self.width, left)

    # -- sections -----------------------------------------------------------------------------

    def _verdict(self, said: Sequence[str]) -> Text:
        """The sentence from the edge on, so that nothing is read before it."""
        wrapped = [textwrap.fill(each, self.width, break_on_hyphens=False) for each in said]
        return Text("\n".join(wrapped), style="bold")

    def _header(self) -> list[str]:
        plan = self.plan
        ranks, rows = plan.n_stages * plan.dp, plan.microbatches * plan.microbatch_rows * plan.dp
        return [
            f"microbatch: {plan.shape}",
            f"{counted(len(plan.stages), 'stage')}{self._dealt()} × dp {plan.dp} = "
            f"{counted(ranks, 'rank')}; "
            f"{counted(plan.microbatches, 'microbatch')} of "
            f"{counted(plan.microbatch_rows, 'row')} per replica, {counted(rows, 'row')} per step",
        ]

    @property
    def _shares(self) -> bool:
        """Whether a rank holds several stages."""
        return self.plan.virtual_stages > 1

    def _dealt(self) -> str:
        plan = self.plan
        return f" on {counted(plan.n_stages, 'rank')}" if self._shares else ""

    def _precision(self, fp32: Plan) -> Group:
        """What was cast, and what that saves on the same stages."""
        plans = (self.plan, fp32)
        sizes = {
            "stash of a microbatch": [sum(s.stash_bytes for s in p.stages) for p in plans],
            "sent per microbatch": [sum(map(sent_bytes, p.stages)) for p in plans],
            f"largest peak of a {'rank' if self._shares else 'stage'}": [
                max(s.memory.peak for s in p.stages) for p in plans
            ],
        }
        if not self.plan.training:
            del sizes["stash of a microbatch"]
        shown = [[bytes_text(size) for size in pair] for pair in sizes.values()]
        shown.append([seconds_text(p.step_s) for p in plans])
        numbers: list[list[float]] = [[*pair] for pair in sizes.values()]
        numbers.append([p.step_s for p in plans])
        name = self.plan.options["precision"].partition(" ")[0]
        table = self._table(
            {
                "": [*sizes, "predicted step"],
                name: [mine for mine, _ in shown],
                "fp32": [theirs for _, theirs in shown],
                "change": [f"{m / t - 1:+.0%}" if t else "–" for m, t in numbers],
            },
            left=("",),
        )
        said = [note for name, note in self.plan.notes if name == "precision"]
        return Group(self._lines("mixed precision", said), table)

    def _trials(self, trials: Sequence[Trial], searched: str) -> Group:
        """Ways to use the devices; which one was taken, and why."""
        ways = ways_of(self.plan, trials)
        parts = [self._lines(ways.title), self._table(ways.columns, left=ways.left)]
        said = [*filter(None, (searched, ways.why)), *ways.refused]
        return Group(*parts, *([self._lines("tried", said)] if said else []))

    def _stages(self) -> RenderableType:
        """One row per stage; seconds, stash and sends are of one microbatch."""
        stages = self.plan.stages
        count = count_scale([s.param_count for s in stages])
        time = seconds_scale([max(s.forward_s, s.backward_s, s.recompute_s) for s in stages])
        stash = bytes_scale([s.stash_bytes for s in stages])
        sent = bytes_scale([sent_bytes(s) for s in stages])
        weights = bytes_scale([s.param_bytes for s in stages])
        backward = {
            f"backward\n{time.unit}": [time.text(s.backward_s) for s in stages],
            f"recom-\npute\n{time.unit}": [time.text(s.recompute_s) for s in stages],
            f"stash ×\nin flight\n{stash.unit}": [
                f"{stash.text(s.stash_bytes)} × {s.in_flight}" for s in stages
            ],
        }
        return self._table(
            {
                "stage": [s.stage for s in stages],
                **({"rank": [s.rank for s in stages]} if self._shares else {}),
                **({"device": [s.device for s in stages]} if stages[0].device else {}),
                "units": [s.units for s in stages],
                f"params\n{count.unit}": [count.text(s.param_count) for s in stages],
                f"weights\n{weights.unit}": [weights.text(s.param_bytes) for s in stages],
                f"forward\n{time.unit}": [time.text(s.forward_s) for s in stages],
                **(backward if self.plan.training else {}),
                f"sends\n{sent.unit}": [sent.text(sent_bytes(s)) for s in stages],
            },
            left=("device",),
        )

    def _memory(self) -> Group:
        """Bytes of each rank's fullest moment; "other" is buffers, constants, batch and residue,
        "device" what its device takes for itself."""
        limits = [self.plan.limit_of(stages[0]) for stages in self.plan.ranks]
        held = [stages[0].memory for stages in self.plan.ranks]
        who = "rank" if self._shares else "stage"
        scale = bytes_scale([m.needed for m in held] + [limit for limit in limits if limit])
        columns: dict[str, list[int]] = {
            "weights": [m.weights + m.copies for m in held],
            "gradi-\nents": [m.grads for m in held],
            "opti-\nmizer": [m.states for m in held],
            "other": [m.buffers + m.constants + m.batch + m.residue for m in held],
            "activa-\ntions": [working_bytes(m) for m in held],
        }
        if any(m.device for m in held):
            columns["device"] = [m.device for m in held]
        if not self.plan.training:
            del columns["gradi-\nents"], columns["opti-\nmizer"]
        shown: dict[str, Sequence[object]] = {who: range(len(held))}
        shown |= {name: [scale.text(n) for n in numbers] for name, numbers in columns.items()}
        shown["peak in"] = [m.peak_at for m in held]
        title = f"memory of a {who} at its peak, {scale.unit}"
        most = max((limit for limit in limits if limit), default=None)
        if most is None:
            shown["peak"] = [scale.text(m.needed) for m in held]
        else:
            widest = scale.text(most)
            room = tables.rest(shown, self.width) - len(f"[] {widest} of {widest}")
            shown["peak"] = [
                Text.assemble(
                    *_bar(m.needed, limit or most, room),
                    f"{scale.text(m.needed)} of {scale.text(limit or most)}",
                )
                for m, limit in zip(held, limits, strict=True)
            ]
        return Group(self._lines(title), self._table(shown, left=("peak in",)))

    def _transfers(self) -> RenderableType:
        sends = [(stage.stage, t) for stage in self.plan.stages for t in stage.sends]
        return self._table(
            {
                "from": [src for src, _ in sends],
                "to": [t.dst for _, t in sends],
                "phase": [t.phase for _, t in sends],
                "bytes": [bytes_text(t.bytes) for _, t in sends],
                "values": [values_text(t) for _, t in sends],
            },
            left=("phase", "values"),
        )

    def _comparison(self, rows: Sequence[Comparison]) -> Group:
        limited = self.plan.budget_bytes is not None
        title = self._lines(
            f"compared at the problem's prices: {self._priced()}, transfers in full, no optimizer"
        )
        table = self._table(
            {
                "strategy": [r.name for r in rows],
                f"slowest\n{'rank' if self._shares else 'stage'}": [
                    "–" if r.reason else seconds_text(r.bottleneck_s) for r in rows
                ],
                "step": ["–" if r.reason else seconds_text(r.step_s) for r in rows],
                "to this\nplan": ["–" if r.reason else f"{r.ratio:.3f} ×" for r in rows],
                "peak": ["–" if r.reason else bytes_text(r.peak_bytes) for r in rows],
                f"on\n{'rank' if self._shares else 'stage'}": [
                    "–" if r.reason else r.peak_rank for r in rows
                ],
                "fits, or\nis over": [fit_text(r, limited) for r in rows],
                "units per stage": [r.reason or " ".join(map(str, r.units)) for r in rows],
            },
            left=("strategy", "fits, or\nis over", "units per stage"),
        )
        return Group(title, table)

    def _priced(self) -> str:
        if self.plan.options.get("schedule", DEFAULT) == DEFAULT:
            return "(m−1) · slowest + Σ"
        return "m · slowest + what the schedule waits"

    def _passes(self, records: Sequence[PassRecord]) -> Group:
        """In the order in which they end; capturing holds those of the forward level."""
        table = self._table(
            {
                "": range(1, len(records) + 1),
                "level": [record.level for record in records],
                "pass": [record.name for record in records],
                "time": [seconds_text(record.seconds) for record in records],
                "what it did": [record.note for record in records],
            },
            left=("level", "pass", "what it did"),
        )
        return Group(self._lines("passes"), table)

    # -- totals -------------------------------------------------------------------------------

    def _speed(self) -> list[str]:
        plan = self.plan
        ranks = [sum(map(stage_seconds, stages)) for stages in plan.ranks]
        slowest = max(range(len(ranks)), key=ranks.__getitem__)
        mean = sum(ranks) / len(ranks)
        last_s = max(self.timeline.closing_s, default=0.0)
        what = "optimizer and gradient exchange" if plan.dp > 1 else "optimizer"
        closing = f", {seconds_text(last_s)} of it {what}" if plan.training else ""
        ideal = (plan.n_stages - 1) / (plan.microbatches + plan.n_stages - 1)
        made = plan.microbatches * plan.dp
        who = "rank" if self._shares else "stage"
        usual = "1f1b " if self._shares else ""
        rows = f"{rate_text(made * plan.microbatch_rows / plan.step_s)} rows/s"
        tokens = f"{rate_text(made * plan.microbatch_tokens / plan.step_s)} tokens/s, "
        return [
            f"{'step' if plan.training else 'forward of a batch'}: {seconds_text(plan.step_s)} "
            f"predicted{closing}; {tokens if plan.microbatch_tokens else ''}{rows}",
            f"bottleneck: {who} {slowest}, {seconds_text(ranks[slowest])} per microbatch, "
            f"{ranks[slowest] / mean if mean else 1:.2f} × the mean",
            f"bubble: {plan.bubble:.1%}; {usual}with equal stages and free transfers "
            f"(S−1)/(m+S−1) = {ideal:.1%}",
        ]

    def _amounts(self) -> list[str]:
        plan = self.plan
        stages, m = plan.stages, plan.microbatches
        run = "step" if plan.training else "batch"
        forward, backward, again = (
            m * plan.dp * sum(getattr(stage, f"{phase}_flops") for stage in stages)
            for phase in ("forward", "backward", "recompute")
        )
        fullest = plan.fullest
        budget, peak = plan.limit_of(fullest), fullest.memory.needed
        share = f", {peak / budget:.0%} of the budget" if budget else ""
        where = f"rank {fullest.rank}" if self._shares else f"stage {fullest.stage}"
        return [
            f"compute: {flops_text(forward)} forward"
            + (f", {flops_text(backward)} backward" if plan.training else "")
            + (f", {flops_text(again)} recomputed" if again else "")
            + f" per {run} of all replicas",
            f"transfers: {bytes_text(m * sum(map(sent_bytes, stages)))} per {run} of one replica",
            f"memory: at most {bytes_text(peak)}, on {where} in "
            f"{fullest.memory.peak_at}{share or '; no limit was given'}",
        ]

    def _origin(self) -> list[str]:
        """How the plan was found, and where its seconds come from."""
        plan, search = self.plan, self.plan.decision.search
        sure = (
            "proven best" if search.proven else f"at most {search.gap:.1%} from the best possible"
        )
        took = self.extras.search_s
        when = "read from a file" if took is None else f"in {seconds_text(took)}"
        parts = [f"{sure} at the problem's prices", _TIMES.get(search.solver, search.solver), when]
        costs = {
            "roofline": f"peak rates of {plan.device} (roofline): nothing runs faster than that",
            "calibrated": f"what {plan.device} reaches by shape (calibrated)",
        }.get(plan.costs, f"measured ({plan.costs})")
        return [
            f"division: {', '.join(parts + ([search.note] if search.note else []))}",
            f"seconds: {costs}",
        ]


def _bar(part: float, whole: float, room: int) -> tuple[Text | str, ...]:
    """With a space behind it; nothing where there is no room."""
    return (bar(part, whole, room), " ") if room >= LEAST_BAR else ()
