"""A compiled graph -> the plan that people read, and the simulated step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...passes.graph.placement import Placement
from ...passes.schedule.simulate import Timeline, simulate
from ..capture.batch import BatchSpec
from ..capture.skeleton import Skeleton
from ..costs.topology import ORDERS
from ..ir.actions import homes_of, max_in_flight
from ..ir.graph import Phase, module_of, nbytes, phase_of
from ..ir.locality import Locality, is_gradient_sum
from ..memory.rank_memory import RankMemory
from ..plan.decision import Decision
from ..plan.plan import MemoryPlan, Plan, StagePlan, TiedPlan, Transfer, covered_modules
from ..planning.advice import compression_note, freezing_note, gib, rows_note
from ..planning.orders import runs_of
from .assembly import Assembly
from .record import PassRecord
from .work import Settings


class Summary:
    """Everything that the plan of one graph says.

    Args:
        decision: of the graph; one that follows another graph's stages has units without seconds.
        closing_s: per rank, seconds after its last microbatch.
        costs: where seconds come from.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        settings: Settings,
        placement: Placement,
        assembly: Assembly,
        decision: Decision,
        closing_s: Sequence[float],
        costs: str,
    ):
        self.skeleton, self.settings, self.device = skeleton, settings, settings.rates
        self.options, self.footprint = settings.options, settings.footprint
        self.placement, self.assembly = placement, assembly
        self.decision, self.costs = decision, costs
        self.program, self.schedule = assembly.program, assembly.schedule
        self.homes = homes_of(self.schedule)
        self.closing_s = closing_s
        units, shares = decision.stages_and_seconds, decision.weight_shares
        self.timing = assembly.timing.priced(units, shares)
        self.work, self.seconds = self.timing.work, self.timing.seconds

    def timeline(self) -> Timeline:
        held_bytes = [memory.after_bytes for memory in self.assembly.memory]
        return simulate(
            self.schedule,
            self.timing.compute_s(),
            self.timing.transfer_s(),
            self.closing_s,
            held_bytes,
            send_s=self.timing.send_s(),
        )

    def plan(
        self,
        spec: BatchSpec,
        timeline: Timeline,
        records: Sequence[PassRecord],
    ) -> Plan:
        modules = self._modules()
        options = self.options
        budgets = self.settings.budgets
        return Plan(
            model=type(self.skeleton.model).__name__,
            n_stages=options.n_stages,
            virtual_stages=options.virtual,
            dp=options.dp,
            microbatches=self.settings.microbatches,
            microbatch_rows=spec.rows,
            shape=str(spec),
            microbatch_tokens=_tokens(spec),
            device=self.device.name,
            costs=self.costs,
            budget_bytes=None if math.isinf(min(budgets)) else int(min(budgets)),
            param_count=sum(self.footprint.size(name)[0] for name in self.skeleton.params),
            options=options.in_plan() | self._numbered(),
            decision=self.decision,
            stages=tuple(
                self._stage(stage.stage, modules, self.assembly.memory[self.homes[stage.stage]])
                for stage in self.program.stages
            ),
            tied=tuple(self._tied()),
            schedule=tuple(" ".join(map(str, actions)) for actions in self.schedule),
            step_s=timeline.step_s,
            bubble=timeline.bubble,
            notes=(
                *((each.name, each.note) for each in records if each.told),
                *self._seated(),
                *self._freezing(),
                *self._compressed(),
                *self._touched(),
            ),
        )

    def _seated(self) -> Iterator[tuple[str, str]]:
        """Which rank has which device, where they are counted, and what that takes for itself."""
        if self.device.order:
            yield "devices", self.decision.order_note or f"ranks on {runs_of(self.device.order)}"
        ranks = range(len(self.schedule))
        taken = [self.settings.taken(self.program, rank) for rank in ranks]
        most = max(ranks, key=lambda rank: sum(size for _, size in taken[rank]))
        if taken[most]:
            parts = ", ".join(f"{gib(size)} {what}" for what, size in taken[most])
            yield "device memory", f"taken of that of rank {most} before any tensor: {parts}"

    def _freezing(self) -> Iterator[tuple[str, str]]:
        """What frozen parameters save, where there are some."""
        found = self.footprint.saved_by_freezing()
        if self.program.trains and found.frozen:
            forward = math.fsum(s.forward for s in self.seconds)
            backward = math.fsum(s.backward for s in self.seconds)
            idle = [
                s.stage
                for s in self.program.stages
                if not any(self.work[s.stage, kind].seconds for kind in ("B", "W"))
            ]
            yield "freezing", freezing_note(found, forward, backward, idle)

    def _stage(self, s: int, modules: Sequence[Sequence[str]], memory: RankMemory) -> StagePlan:
        part, seconds = self.program.stages[s], self.seconds[s]
        sizes = [self._size(name) for name in part.params]
        backward = self.work[s, "B"] + self.work[s, "W"]
        mine = [i for i, stage in enumerate(self.decision.unit_stage) if stage == s]
        labels = Counter(self.decision.unit_recomputes[i] for i in mine)
        return StagePlan(
            stage=s,
            rank=self.homes[s],
            modules=covered_modules(modules[s], modules, s),
            units=len(mine),
            params=part.params,
            param_count=sum(count for count, _ in sizes),
            param_bytes=sum(size for _, size in sizes),
            forward_flops=self.work[s, "F"].flops,
            backward_flops=backward.flops - self.work[s, "R"].flops,
            recompute_flops=self.work[s, "R"].flops,
            forward_s=seconds.forward,
            backward_s=seconds.backward,
            recompute_s=seconds.recompute,
            closing_s=self.closing_s[self.homes[s]],
            recomputes={label: n for label, n in sorted(labels.items()) if label != "nothing"},
            stash_bytes=part.stash_bytes,
            carry_bytes=part.carry_bytes,
            in_flight=max_in_flight(self.schedule[self.homes[s]], s),
            memory=MemoryPlan(
                **vars(memory.static),
                peak=memory.peak_bytes,
                peak_at=memory.peak_at,
                device=memory.device_bytes,
            ),
            sends=tuple(
                Transfer(m.dst, m.phase.value, m.nbytes, tuple(v.name for v in m.values))
                for m in self.program.messages
                if m.src == s and self.homes[m.dst] != self.homes[s]
            ),
            exchanged_bytes=self._exchanged(self.homes[s]),
            **self._own(self.homes[s]),
        )

    def _own(self, rank: int) -> dict[str, Any]:
        """What a rank has and others have not."""
        budgets, names = self.settings.budgets, self.device.order
        own = {"budget_bytes": int(budgets[rank])} if len(set(budgets)) > 1 else {}
        return own | ({"device": names[rank]} if names else {})

    def _numbered(self) -> dict[str, str]:
        """Which ranks share a machine, where there are several or one has said so."""
        order = self.settings.options.numbering.order
        return {"placement": order} if self.device.placed or order != ORDERS[0] else {}

    def _exchanged(self, rank: int) -> int | None:
        """What a rank gives other replicas of its gradients."""
        mine = [stage for stage, home in self.homes.items() if home == rank]
        return self.footprint.sent_bytes(self.program, mine) if self.program.trains else 0

    def _compressed(self) -> Iterator[tuple[str, str]]:
        """What compression does to the exchange of gradients, of the rank that sends most."""
        method = self.options.compression.gradients
        if method is None or not self.program.trains:
            return
        if self.options.dp == 1:  # which a search has found to be best
            yield "compress", f"gradients as {method}: with one replica none are sent"
            return
        ranks = [[s for s, h in self.homes.items() if h == r] for r in set(self.homes.values())]
        if self.footprint.zero.divides_states:
            sent = max(self.footprint.compressed(self.program, r).sent_bytes for r in ranks)
            yield "compress", f"gradients as {method}: {gib(sent)} per step, parameters besides"
            return
        sent, plain = (
            max(self.footprint.sent_bytes(self.program, each, how) or 0 for each in ranks)
            for how in (True, False)
        )
        rows = bool(self.footprint.touched(self.program, list(self.homes)))
        yield "compress", compression_note(method, sent, plain, rows)

    def _touched(self) -> Iterator[tuple[str, str]]:
        """What becomes of tables of which rows travel, or are stepped, alone."""
        stepped, dp = self.footprint.stepped_rows, self.options.dp
        tables = self.footprint.touched(self.program, list(self.homes))
        chosen = {name: table for name, table in tables.items() if dp > 1 or name in stepped}
        if chosen and self.program.trains:
            yield "sparse_embeddings", rows_note(chosen, dp, stepped)

    def _size(self, name: str) -> tuple[int, int]:
        """(elements, bytes) of a parameter as it is held."""
        count, size = self.footprint.size(name)
        alone = {} if self.options.training else self.program.copied_alone
        return count, count * alone[name].itemsize if name in alone else size

    def _modules(self) -> list[list[str]]:
        modules: list[list[str]] = [[] for _ in range(self.options.stage_count)]
        for node, stage in self.placement.stage.items():
            if phase_of(node) is Phase.FORWARD:
                modules[stage].append(module_of(node))
        return modules

    def _tied(self) -> list[TiedPlan]:
        return [
            TiedPlan(
                tied.name,
                tuple(n for n, first in self.skeleton.canonical.items() if first == tied.name),
                tied.holders,
                tied.owner,
                self.footprint.size(tied.name)[1],
                self._part_bytes(tied.name),
                self.options.tied_grads,
            )
            for tied in self.program.tied
        ]

    def _part_bytes(self, name: str) -> int:
        """What a part of a tied gradient takes on its way."""
        if self.options.tied_grads == "per_step":
            return self.footprint.size(name)[1]
        grad = self.assembly.graph.grads[name]
        sizes = [nbytes(n) for n in grad.all_input_nodes] if is_gradient_sum(grad) else []
        return min(sizes, default=self.footprint.size(name)[1])


def _tokens(spec: BatchSpec) -> int:
    """Ids in the first leaf, if it is one of (rows, tokens)."""
    first = spec.leaves[0]
    ids = len(first.shape) == 2 and first.dtype in (torch.int64, torch.int32)
    return torch.Size(first.shape).numel() if ids else 0


def placement_note(decision: Decision) -> str:
    """How units were divided, in one line."""
    search = decision.search
    if not decision.unit_seconds:
        return "stages as in the first graph"
    proven = "proven best" if search.proven else f"within {search.gap:.1%} of the best possible"
    parts = [f"{len(decision.unit_nodes)} units, {proven} ({search.solver})"]
    return "; ".join(parts + ([search.note] if search.note else []))


def placement_text(decision: Decision, locality: Locality) -> str:
    """A line per unit."""
    nodes = [n for n in locality.staged if phase_of(n) is Phase.FORWARD]
    lines, at = [], 0
    for i, (count, stage) in enumerate(zip(decision.unit_nodes, decision.unit_stage, strict=True)):
        mine = nodes[at : at + count]
        at += count
        modules = ", ".join(dict.fromkeys(module_of(n) or "(model)" for n in mine))
        label = decision.unit_recomputes[i]
        lines.append(f"stage {stage}  unit {i:3d}  {count:4d} nodes  recomputes {label}  {modules}")
    return "\n".join(lines) + "\n"
