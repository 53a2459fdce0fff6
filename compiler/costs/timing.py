"""Seconds of the stages' programs, and of what travels between them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from ..ir import ops
from ..ir.actions import Kind
from ..ir.graph import Phase, phase_of
from ..ir.program import PipelineProgram
from ..ir.shards import Entry
from ..memory.footprint import Footprint
from .cost import Cost, node_cost, total_cost
from .hardware import Device

UnitSeconds = Sequence[tuple[int, tuple[float, float, float]]]
"""Per unit its stage, and seconds of a microbatch: forward, backward, recomputation."""


@dataclass(frozen=True)
class StageSeconds:
    """Of one stage and microbatch."""

    forward: float
    backward: float
    recompute: float


class Timing:
    """What every program takes.

    Args:
        stage: of the graph's staged nodes.
        copies: a node of the backward -> the forward node that it computes again.
        units: nothing where no unit has seconds; the device's rates take their place.
        weight_shares: per stage, of the backward; nothing where the rates say.
        mates: per stage, the stages of its rank.

    Attributes:
        work: per stage, what F, B and W take by the device's rates, and R, what is recomputed in B
            and W.
        seconds: per stage.
    """

    def __init__(
        self,
        program: PipelineProgram,
        stage: Mapping[fx.Node, int],
        copies: Mapping[fx.Node, fx.Node],
        units: UnitSeconds,
        weight_shares: Sequence[float],
        rates: Device,
        footprint: Footprint,
        mates: Sequence[Sequence[int]],
    ):
        self.program, self.rates = program, rates
        self.footprint, self.mates = footprint, mates
        ranks = list(dict.fromkeys(map(tuple, mates)))  # of a replica, in order
        self.home = [ranks.index(tuple(each)) for each in mates]
        self.work = self._work(stage, copies)
        self.seconds, self.weight_shares = self._seconds(units), weight_shares

    def priced(self, units: UnitSeconds, weight_shares: Sequence[float]) -> Timing:
        """The same programs, whose units take other seconds."""
        other = self._fresh()
        other.seconds, other.weight_shares = self._seconds(units), weight_shares
        return other

    def of(self, program: PipelineProgram) -> Timing:
        """Of programs that compute the same, and exchange something else."""
        other = self._fresh()
        other.program = program
        return other

    def _fresh(self) -> Timing:
        """The same with nothing worked out."""
        other = copy(self)
        other.__dict__.pop("_together_s", None)
        return other

    def compute_s(self) -> dict[tuple[int, Kind], float]:
        """Of (stage, kind that computes), with what replicas exchange meanwhile with every
        microbatch."""
        return {key: each for key, (each, _) in self._together_s.items()}

    def late_s(self) -> list[float]:
        """Per stage, by what the last microbatch takes longer, as gradients leave that were added
        up."""
        found = [0.0] * len(self.seconds)
        for (stage, _), (each, last) in self._together_s.items():
            found[stage] += last - each
        return found

    @cached_property
    def _together_s(self) -> dict[tuple[int, Kind], tuple[float, float]]:
        """Of (stage, kind that computes): of any microbatch, and of the last one.

        What replicas exchange during a program runs beside it.
        """
        beside_s, found = self._beside_s(), {}
        waiting = self.rates.waiting(self.footprint.dp * len(set(self.home)))
        for (stage, kind), alone_s in self._alone_s().items():
            pair = (
                waiting * (self._on(stage).together_s(alone_s, sent_s) if sent_s else alone_s)
                for sent_s in beside_s.get((stage, kind), (0.0, 0.0))
            )
            found[stage, kind] = (next(pair), next(pair))
        return found

    def _alone_s(self) -> dict[tuple[int, Kind], float]:
        """Of (stage, kind that computes), with no exchange between replicas."""
        found: dict[tuple[int, Kind], float] = {}
        for stage, seconds in enumerate(self.seconds):
            split = self._weight_share(stage)
            whole = seconds.backward + seconds.recompute
            found[stage, Kind.F] = seconds.forward
            found[stage, Kind.B] = whole * (1 - split)
            found[stage, Kind.W] = whole * split
            self._launch(found, stage)
        return found

    def _weight_share(self, stage: int) -> float:
        """Of its backward, how much is weight gradients that are split off."""
        if self.weight_shares:
            return self.weight_shares[stage]
        weight, rest = self.work[stage, "W"].seconds, self.work[stage, "B"].seconds
        return weight / (weight + rest) if weight else 0.0

    def transfer_s(self) -> dict[tuple[int, int], float]:
        """Of a message from one stage to another."""
        home = self.home
        return {
            (m.src, m.dst): self.rates.message_s(home[m.src], home[m.dst], m.nbytes)
            for m in self.program.messages
        }

    def send_s(self) -> dict[tuple[int, int], float]:
        """Of a message from one stage to another: in which its sender computes nothing."""
        return self.rates.send_s(self.transfer_s(), self.home)

    def _on(self, stage: int) -> Device:
        """The device of its rank."""
        return self.rates.at(self.home[stage])

    def _beside_s(self) -> dict[tuple[int, Kind], tuple[float, float]]:
        """Of (stage, kind that computes) what replicas exchange meanwhile: with any microbatch, and
        with the last one.

        At level 3 a program fetches its parameters. From level 2 on gradients leave with every
        microbatch; those that add up whole leave with the last one.
        """
        dp, found = self.footprint.dp, {}
        if not self.footprint.zero.divides_states or dp == 1:
            return {}
        for stage, code in enumerate(self.program.stages):
            device = self._on(stage)
            leaves = self.footprint.traffic(self.program, stage, self.mates[stage]).departures
            for part, program in code.parts.items():
                gathers = [n for n in program.module.graph.nodes if n.target is ops.gather]
                every = _scattered(leaves.every.get(part, ()))
                every += [n.meta["whole_bytes"] for n in gathers]
                last = every + _scattered(leaves.last.get(part, ()))
                found[stage, part] = (
                    device.collective_s(sum(every), dp, len(every)),
                    device.collective_s(sum(last), dp, len(last)),
                )
        return found

    def _launch(self, compute_s: dict[tuple[int, Kind], float], stage: int) -> None:
        """By a device's table, what programs do besides their operators counts too: gradients are
        added to sums or packed; and none takes less than the host does to launch all of it."""
        rates = self._on(stage)
        if rates.table is None:
            return
        for part, program in self.program.stages[stage].parts.items():
            adds = [n for n in program.module.graph.nodes if n.target is ops.accumulate]
            added = total_cost(adds, rates)
            launches = self.work[stage, part.value].launches + added.launches
            seconds = compute_s[stage, part] + added.seconds
            compute_s[stage, part] = rates.program_s(seconds, launches)

    def _work(
        self, stages: Mapping[fx.Node, int], copies: Mapping[fx.Node, fx.Node]
    ) -> dict[tuple[int, str], Cost]:
        work: dict[tuple[int, str], Cost] = defaultdict(Cost)
        for node, stage in stages.items():
            kind = "F" if phase_of(node) is Phase.FORWARD else "B"
            if node.name in self.program.weight_nodes:
                kind = "W"
            cost = node_cost(node, self._on(stage))
            work[stage, kind] += cost
            if node in copies:
                work[stage, "R"] += cost
        return work

    def _seconds(self, units: UnitSeconds) -> list[StageSeconds]:
        return [self._stage(each.stage, units) for each in self.program.stages]

    def _stage(self, stage: int, units: UnitSeconds) -> StageSeconds:
        if not units:
            again = self.work[stage, "R"].seconds
            backward_s = self.work[stage, "B"].seconds + self.work[stage, "W"].seconds - again
            return StageSeconds(self.work[stage, "F"].seconds, backward_s, again)
        mine = [seconds for s, seconds in units if s == stage]
        forward, backward, recompute = (math.fsum(unit[i] for unit in mine) for i in range(3))
        return StageSeconds(forward, backward, recompute)


def _scattered(leaving: Sequence[Sequence[Entry]]) -> list[int]:
    """Bytes of the parcels in which gradients leave."""
    return [
        parcel.scatter_bytes[0] for entries in leaving for parcel, number in entries if number == 0
    ]
