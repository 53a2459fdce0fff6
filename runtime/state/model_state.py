"""Which tensors this process holds: parameters and buffers of the ranks that it plays.

Each rank's weights are made at compile time, on its device, from a `Source`; the user's model is
not touched and may be deleted. Ranks of one process that share a device share their parameters:
what replicas in processes divide among themselves (`Shards`), they hold once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from functools import partial

import torch
from torch import nn

from ...compiler.capture.skeleton import Skeleton
from ...compiler.compression.methods import Method
from ...compiler.driver.layout import Layout
from ...compiler.ir.errors import StateError
from ...compiler.ir.precision import Precision
from ...compiler.ir.program import PipelineProgram
from ...compiler.ir.shards import owners_of, rows_of
from ..compression.compressed import Compressed
from ..transport.processes import Processes
from ..transport.transport import Endpoint
from ..weights.allocation import Cut
from ..weights.materialize import Source, materialize
from .bucket import Bucket
from .gradients import SentGradients, SharedGradients, WholeGradients
from .rank_state import RankState
from .sharded import Shards

Held = Mapping[str, torch.Tensor]
"""Name -> what a device of this process keeps of it."""


class ModelState:
    """Who holds which parameter, of the ranks that this process plays.

    Args:
        source: what the tensors are filled from.
        layout: which stages hold a parameter, and what replicas divide.
        program: the first one; it tells which parameters it reads whole.
        precision: in which dtypes gradients add up.
        endpoints: of the ranks that this process plays.
        training: whether weights are stepped; else those of which a program reads the copy alone
            are held as that.
        compress: how gradients travel between replicas; None for as they are.

    Attributes:
        homes: parameter FQN -> the stages that hold it.
        ranks: rank -> its tensors.
        owners: of the parameters that one replica has all rows of.
        primary: parameter FQN -> the first rank of this process that holds it, and what the
            optimizer steps; without those that are another replica's.
        digests: name -> a hash of the whole tensor that this process has taken values from.
        tables: FQNs of the parameters of which replicas exchange touched rows alone.
        stepped_rows: FQNs of those of which the optimizer is given touched rows alone.
        swapped: whether averages are in the place of the weights.

    Raises:
        StateError: the source lacks one of them, or no gradient can be compressed.
    """

    def __init__(
        self,
        source: Source,
        skeleton: Skeleton,
        layout: Layout,
        program: PipelineProgram,
        precision: Precision | None,
        endpoints: Mapping[int, Endpoint],
        training: bool = True,
        compress: Method | None = None,
    ):
        self._compress = compress
        self.tables, self.stepped_rows = layout.tables, layout.stepped_rows
        self.skeleton, self.homes, self.zero = skeleton, layout.homes, layout.zero
        self._layout = layout
        self.mesh = next(iter(endpoints.values())).mesh
        named = dict(skeleton.module.named_parameters())
        self.owners = owners_of(named, self.homes, self.mesh.dp) if self.zero.matrices else {}
        self.copies: dict[tuple[str, torch.device], nn.Parameter] = {}
        self.primary: dict[str, tuple[int, nn.Parameter]] = {}
        self.ranks: dict[int, RankState] = {}
        self.swapped = False
        trained = {n: p.dtype for n, p in skeleton.module.named_parameters() if p.requires_grad}
        self._sums = {n: precision.grads_of(d) if precision else d for n, d in trained.items()}
        names, cuts = self._names(endpoints), self._cuts(endpoints, program)
        alone = {} if training else program.copied_alone
        self._narrow = frozenset(alone)
        made = materialize(source, skeleton, names, cuts, alone)
        self.digests = {name: each.digest for name, each in made.items()}
        for rank, end in endpoints.items():
            held = {n: e.held[end.device] for n, e in made.items() if end.device in e.held}
            self.ranks[rank] = self._rank(end, held, program)
        for name in skeleton.params:
            first = self._first_local_rank(name)
            if first is not None and self._owns(first, name):
                self.primary[name] = (first, self.master(first, name))

    # -- making -----------------------------------------------------------------------------

    def _names(self, endpoints: Mapping[int, Endpoint]) -> dict[torch.device, list[str]]:
        """What is held on each device of this process: its stages' parameters, all buffers."""
        stages: dict[torch.device, set[int]] = defaultdict(set)
        for end in endpoints.values():
            stages[end.device].update(end.stages)
        names = dict.fromkeys(self.skeleton.canonical.values())
        return {
            device: [name for name in names if here.intersection(self.homes.get(name, here))]
            for device, here in stages.items()
        }

    def _cuts(self, endpoints: Mapping[int, Endpoint], program: PipelineProgram) -> dict[str, Cut]:
        """How this process's rows are cut, of the parameters that it never has whole."""
        if not self.mesh.distributed or not self.zero.divides_states:
            return {}
        (end,) = endpoints.values()
        return {
            name: partial(rows_of, dp=end.dp, replica=end.replica, owner=self.owners.get(name))
            for name in self.divided - self._kept(end, program)
        }

    def _kept(self, end: Endpoint, program: PipelineProgram) -> set[str]:
        """The divided parameters that a rank keeps whole, for its programs read them."""
        read = {name for stage in end.stages for name in program.stages[stage].direct}
        kept = self._layout.kept_on(end.stages[0])
        return {name for name in self.divided & read if self.zero.whole_param(name, kept)}

    def _rank(self, end: Endpoint, held: Held, program: PipelineProgram) -> RankState:
        shared = any(state.device == end.device for state in self.ranks.values())
        buffers = {n: t.clone() if shared else t for n, t in held.items() if n not in self.homes}
        names = [n for n in self.skeleton.params if set(end.stages).intersection(self.homes[n])]
        if self.zero.divides_states and isinstance(end.transport, Processes):
            shards, params, grads = self._divide(end, names, held, program)
            return RankState(end, params, buffers, grads, shards, self.owners)
        params = {name: self._copy(name, held[name]) for name in names}
        slots = {name: param for name, param in params.items() if name in self._sums}
        if not self.zero.streams:
            whole = WholeGradients(slots, self._sums, end, end.dp, self._compress, self.tables)
            return RankState(end, params, buffers, whole, owners=self.owners)
        leader = self.ranks[end.peers[0]].grads if end.replica else None
        assert leader is None or isinstance(leader, SharedGradients)
        grads = SharedGradients(slots, self._sums, end, leader, self._whole_grads(end, slots))
        return RankState(end, params, buffers, grads, owners=self.owners)

    def _divide(
        self, end: Endpoint, names: list[str], held: Held, program: PipelineProgram
    ) -> tuple[Shards, dict[str, torch.Tensor], WholeGradients]:
        """A rank's rows, the parameters that it keeps whole, and where gradients add up."""
        like = {n: self._like(n) for n in names if n in self.divided}
        is_whole = partial(self.zero.whole_param, kept=self._layout.kept_on(end.stages[0]))
        shards = Shards(like, held, self._kept(end, program), is_whole, end, self.owners)
        rows = {name: shards.masters[name] for name in names if name in self._sums}
        if self.zero.closes and self._compress is not None:
            whole = {name: shards.like[name] for name in rows}
            grads = WholeGradients(whole, self._sums, end, end.dp, self._compress)
            grads.divide(self.owners, whole)
        else:
            of = self._sums, end, self.owners, self.zero, self._whole_grads(end, rows)
            grads = SentGradients(rows, shards.like, *of)
        rest = {name: self._copy(name, held[name]) for name in names if name not in like}
        return shards, rest | shards.whole, grads

    def _whole_grads(self, end: Endpoint, names: Collection[str]) -> set[str]:
        kept = self._layout.kept_on(end.stages[0])
        return {name for name in names if self.zero.whole_grad(name, kept)}

    def _like(self, name: str) -> nn.Parameter:
        return self.skeleton.module.get_parameter(name)

    def _copy(self, name: str, tensor: torch.Tensor) -> nn.Parameter:
        if (name, tensor.device) not in self.copies:
            trained = self._like(name).requires_grad
            self.copies[name, tensor.device] = nn.Parameter(tensor, requires_grad=trained)
        return self.copies[name, tensor.device]

    # -- who holds what ---------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Of the first rank of this process."""
        return next(iter(self.ranks.values())).device

    @property
    def divided(self) -> set[str]:
        """The parameters that replicas divide, on any stage."""
        if not self.zero.divides_states:
            return set()
        return set(self.homes) if self.zero.divides_params else set(self._sums)

    @property
    def compressed(self) -> dict[int, Compressed]:
        """Rank -> its gradients' exchange, where that is compressed."""
        found = {rank: state.grads.compressed for rank, state in self.ranks.items()}
        return {rank: each for rank, each in found.items() if each is not None}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that this process trains, in the model's order, each once."""
        for name, (_, param) in self.primary.items():
            yield name, param

    @property
    def trained(self) -> Collection[str]:
        """FQNs of the parameters that programs have gradients of."""
        return self._sums.keys()

    @property
    def switched(self) -> list[tuple[str, bool]]:
        """The parameters whose ``requires_grad`` is not what it was compiled for -> what it is."""
        return [
            (name, param.requires_grad)
            for name, param in self.named_parameters()
            if param.requires_grad != (name in self._sums)
        ]

    def master(self, rank: int, name: str) -> nn.Parameter:
        """What the optimizer steps, of a parameter that a rank holds."""
        shards = self.ranks[rank].shards
        if shards is not None and name in shards.masters:
            return shards.masters[name]
        return self.copies[name, self.ranks[rank].device]

    def has_rows(self, name: str) -> bool:
        """Whether this process holds some rows of a parameter only."""
        rank = self._first_local_rank(name)
        shards = None if rank is None else self.ranks[rank].shards
        return shards is not None and name in shards.masters

    def is_ours(self, name: str) -> bool:
        """Whether this process plays the rank that answers for a parameter: that of the first
        stage that holds it, in the replica that owns it, or replica 0."""
        replica = self.owners.get(name, 0)
        return self.mesh.rank_of(replica, self.homes[name][0]) in self.ranks

    def _owns(self, rank: int, name: str) -> bool:
        shards = self.ranks[rank].shards
        return shards is None or shards.owns(name)

    def as_stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this process holds of a parameter, or of a state of its shape, as checkpoints see
        it: a DTensor where replicas divide it."""
        rank = self._first_local_rank(name) if name in self.homes else None
        shards = None if rank is None else self.ranks[rank].shards
        return tensor if shards is None else shards.as_dtensor(name, tensor)

    def _home(self, stage: int) -> int:
        return self.mesh.rank_of(0, stage)

    def _first_local_rank(self, name: str) -> int | None:
        homes = set(self.homes[name])
        return next(
            (r for r, state in self.ranks.items() if homes.intersection(state.stages)), None
        )

    # -- what programs read -----------------------------------------------------------------

    def provide(self, program: PipelineProgram) -> None:
        """Make room for the copies in the compute dtype that a program reads.

        Raises:
            StateError: it reads a weight itself of which the copy alone is held.
        """
        self._check_held(program)
        for state in self.ranks.values():
            state.copies |= {name: state.params[name] for name in self._narrow & set(state.params)}
            stages = [program.stages[stage] for stage in state.stages]
            if state.shards is not None:
                state.shards.provide(stages)
                state.params |= state.shards.whole
                state.copies |= state.shards.copies
            wanted = {
                name: dtype
                for stage in stages
                for name, dtype in stage.copies.items()
                if name not in state.copies and not (state.shards and self.has_rows(name))
            }
            params = {name: state.params[name] for name in wanted}
            state.copies |= Bucket(params, wanted, state.device, self.mesh.dp).views

    def _check_held(self, program: PipelineProgram) -> None:
        direct = {name for stage in program.stages for name in stage.direct}
        for name in sorted(self._narrow & direct):
            raise StateError(
                f"this graph reads {name!r} in the model's dtype; the first one did not, so that "
                "with training=False it is held in the compute dtype alone: run this one first, or "
                "leave precision= out"
            )

    @torch.no_grad()
    def spread(self) -> None:
        """Give what is made of the parameters what the optimizer, or the user, did to them: the
        copies on other devices of this process, and those in the compute dtype."""
        for (name, _), copy in self.copies.items():
            param = self.primary[name][1]
            if copy is not param:
                copy.copy_(param)
        for state in self.ranks.values():
            for name, narrow in state.copies.items():
                if name not in self._narrow and not (state.shards and name in state.shards.masters):
                    narrow.copy_(state.params[name])
