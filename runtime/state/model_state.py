"""The tensors that this process holds: parameters, buffers, gradients; and the state dict.

Each rank's weights are made at compile time, on its device, from a `Source`; the user's model is
not touched and may be deleted. Ranks of one process that share a device share their parameters:
what replicas in processes divide among themselves (`Shards`), they hold once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ...compiler.capture.skeleton import Skeleton
from ...compiler.ir.errors import StateError
from ...compiler.ir.precision import Precision
from ...compiler.ir.program import PipelineProgram
from ...compiler.ir.shards import rows_of
from ...compiler.ir.zero import Zero
from ..exchange.devices import device_of
from ..exchange.mesh import Mesh
from ..exchange.processes import Processes
from ..exchange.transport import Transport
from ..weights.allocation import Cut
from ..weights.materialize import Source, materialize
from .bucket import Bucket, GradSlot
from .gradients import (
    ClosingGradients,
    SharedGradients,
    StreamGradients,
    WholeGradients,
    own_squares,
    squares,
)
from .rank_state import RankState
from .sharded import Shards


class ModelState:
    """Parameters, buffers and gradients of the ranks that this process plays.

    Args:
        source: what the tensors are filled from.
        homes: parameter FQN -> the stages that hold it.
        device: the type of device; every rank's own is `device_of` it.
        precision: in which dtypes gradients add up.
        zero: what replicas divide among themselves.
        program: the first one; it tells which parameters it reads whole.

    Attributes:
        digests: name -> a hash of the whole tensor that this process has taken values from.

    Raises:
        StateError: the source lacks one of them.
    """

    def __init__(
        self,
        source: Source,
        skeleton: Skeleton,
        homes: Mapping[str, tuple[int, ...]],
        mesh: Mesh,
        device: torch.device,
        precision: Precision | None,
        zero: Zero,
        program: PipelineProgram,
        transport: Transport,
    ):
        self.skeleton, self.homes, self.mesh, self.zero = skeleton, homes, mesh, zero
        self.copies: dict[tuple[str, torch.device], nn.Parameter] = {}
        self.primary: dict[str, tuple[int, nn.Parameter]] = {}
        self.ranks: dict[int, RankState] = {}
        trained = {n: p.dtype for n, p in skeleton.module.named_parameters() if p.requires_grad}
        self._sums = {n: precision.grads_of(d) if precision else d for n, d in trained.items()}
        self._before: dict[str, torch.Tensor] = {}
        made = materialize(source, skeleton, self._names(device), self._cuts(program))
        self.digests = {name: each.digest for name, each in made.items()}
        for rank in mesh.local_ranks:
            where = device_of(rank, device, mesh)
            held = {n: each.held[where] for n, each in made.items() if where in each.held}
            self.ranks[rank] = self._rank(rank, where, held, program, transport)
        for name in skeleton.params:
            first = self._first_local_rank(name)
            if first is not None:
                self.primary[name] = (first, self._master(first, name))

    def _cuts(self, program: PipelineProgram) -> dict[str, Cut]:
        """How this process's rows are cut, of the parameters that it never has whole."""
        if self.mesh.rank is None or not self.zero.divides_states:
            return {}
        replica = self.mesh.replica_of(self.mesh.rank)
        cut = partial(rows_of, dp=self.mesh.dp, replica=replica)
        whole = self._kept(self.mesh.stage_of(self.mesh.rank), program)
        return dict.fromkeys(self._shared_out - whole, cut)

    def _kept(self, stage: int, program: PipelineProgram) -> set[str]:
        """The divided parameters that a stage's ranks keep whole, for its program reads them."""
        return self._shared_out & program.stages[stage].direct if self.zero.unshards else set()

    def _rank(
        self,
        rank: int,
        where: torch.device,
        held: Mapping[str, torch.Tensor],
        program: PipelineProgram,
        transport: Transport,
    ) -> RankState:
        mesh, stage, zero = self.mesh, self.mesh.stage_of(rank), self.zero
        replica = mesh.replica_of(rank)
        shared = any(state.device == where for state in self.ranks.values())
        buffers = {n: t.clone() if shared else t for n, t in held.items() if n not in self.homes}
        names = [name for name in self.skeleton.params if stage in self.homes[name]]
        if not zero.divides_states or not isinstance(transport, Processes):
            params = {name: self._copy(name, held[name]) for name in names}
            slots = {name: p for name, p in params.items() if name in self._sums}
            if zero.streams:
                leader = self.ranks[mesh.rank_of(0, stage)].grads if replica else None
                assert leader is None or isinstance(leader, SharedGradients)
                grads: WholeGradients = SharedGradients(slots, self._sums, where, leader)
            else:
                grads = WholeGradients(slots, self._sums, where, mesh.dp)
            return RankState(rank, mesh, where, params, buffers, grads)
        like = {name: self._like(name) for name in names if name in self._shared_out}
        shards = Shards(like, held, self._kept(stage, program), transport, where)
        trained = [name for name in names if name in self._sums]
        if zero.closes:
            whole = {name: shards.like[name] for name in trained}
            grads = ClosingGradients(whole, self._sums, where, transport)
        else:
            rows = {name: shards.masters[name] for name in trained}
            grads = StreamGradients(rows, shards.like, self._sums, where, transport)
        rest = {name: self._copy(name, held[name]) for name in names if name not in like}
        return RankState(rank, mesh, where, rest | shards.whole, buffers, grads, shards)

    def _like(self, name: str) -> nn.Parameter:
        return self.skeleton.module.get_parameter(name)

    def _master(self, rank: int, name: str) -> nn.Parameter:
        """What the optimizer steps."""
        shards = self.ranks[rank].shards
        if shards is not None and name in shards.masters:
            return shards.masters[name]
        device = self.ranks[rank].device
        return self.copies[name, device]

    def _divided(self, name: str) -> bool:
        """Whether this process holds some rows of a parameter only."""
        rank = self._first_local_rank(name)
        shards = None if rank is None else self.ranks[rank].shards
        return shards is not None and name in shards.masters

    def _names(self, device: torch.device) -> dict[torch.device, list[str]]:
        """What is held on each device of this process: its stages' parameters, all buffers."""
        stages = defaultdict(set)
        for rank in self.mesh.local_ranks:
            stages[device_of(rank, device, self.mesh)].add(self.mesh.stage_of(rank))
        names = dict.fromkeys(self.skeleton.canonical.values())
        return {
            where: [name for name in names if here.intersection(self.homes.get(name, here))]
            for where, here in stages.items()
        }

    def _copy(self, name: str, tensor: torch.Tensor) -> nn.Parameter:
        if (name, tensor.device) not in self.copies:
            trained = self._like(name).requires_grad
            self.copies[name, tensor.device] = nn.Parameter(tensor, requires_grad=trained)
        return self.copies[name, tensor.device]

    def _first_local_rank(self, name: str) -> int | None:
        return next((r for r in self.ranks if self.mesh.stage_of(r) in self.homes[name]), None)

    # -- parameters -------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that this process trains, in the model's order, each once."""
        for name, (_, param) in self.primary.items():
            yield name, param

    def provide(self, program: PipelineProgram) -> None:
        """Make room for the copies in the compute dtype that a program reads."""
        for state in self.ranks.values():
            stage = program.stages[state.stage]
            if state.shards is not None and self.zero.unshards:
                state.shards.provide(stage)
                state.params |= state.shards.whole
                state.copies |= state.shards.copies
            wanted = {
                name: dtype
                for name, dtype in stage.copies.items()
                if name not in state.copies and not (state.shards and self._divided(name))
            }
            params = {name: state.params[name] for name in wanted}
            state.copies |= Bucket(params, wanted, state.device, self.mesh.dp).views

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
                if state.shards is None or name not in state.shards.masters:
                    narrow.copy_(state.params[name])

    # -- gradients --------------------------------------------------------------------------

    @torch.no_grad()
    def open_gradients(self, scale: float = 1.0) -> None:
        """Before a run: slots take up whatever the user left in ``.grad``; None clears them.

        At zero=1 it is kept aside, as each replica has its own rows of it, and added afterwards.

        Args:
            scale: of the loss in this run.
        """
        if self.zero.closes:
            self._keep_gradients()
            return
        for rank, state in self.ranks.items():
            for name, slot in state.grads.slots.items() if state.grads.leads else ():
                first, param = self.primary[name]
                slot.fresh = param.grad is None
                if param.grad is None:
                    continue
                if slot.owned.dtype is not param.dtype:
                    slot.tensor.copy_(param.grad * scale)
                    continue
                if param.grad is not slot.owned:
                    slot.tensor.copy_(param.grad)
                if rank == first:
                    param.grad = slot.tensor
        for name, (rank, param) in self.primary.items():
            own = self.ranks[rank].grads.slots.get(name)
            if own is not None and own.tensor.dtype is not param.dtype:
                param.grad = None  # the slot has it
        if scale != 1.0:
            for state in self.ranks.values():
                if state.grads.leads:
                    state.grads.scale(scale)

    def _keep_gradients(self) -> None:
        for state in self.ranks.values():
            for slot in state.grads.slots.values():
                slot.fresh = True
        for name, param in self.named_parameters():
            if param.grad is not None:
                self._before[name] = param.grad.clone()
                param.grad = None

    def unscale_gradients(self, scale: float) -> bool:
        """Undo the scaling of the loss; narrow sums are widened first, when they are shown.
        Whether all gradients of this process are finite."""
        finite = all(state.grads.is_finite() for state in self.ranks.values())
        for state in self.ranks.values():
            if state.grads.leads:
                state.grads.scale(1 / scale)
        return finite

    def close_gradients(self, scale: float = 1.0) -> None:
        """After a run: every parameter that got a gradient shows it as ``.grad``."""
        for name, (rank, param) in self.primary.items():
            slot = self.ranks[rank].grads.slots.get(name)
            if slot is not None and not slot.fresh:
                self._show(param, slot, scale)
            before = self._before.pop(name, None)
            if before is not None:
                param.grad = before if param.grad is None else param.grad.add_(before)

    def drop_gradients(self) -> None:
        """As if there had been none, so that no optimizer's step changes anything."""
        self._before.clear()
        for state in self.ranks.values():
            state.grads.clear()
        for _, param in self.named_parameters():
            param.grad = None

    @staticmethod
    def _show(param: nn.Parameter, slot: GradSlot, scale: float = 1.0) -> None:
        """torch wants a gradient in its parameter's dtype."""
        same = slot.owned.dtype is param.dtype
        param.grad = slot.owned if same else slot.owned.to(param.dtype).div_(scale)

    def owned_gradients(self) -> dict[str, torch.Tensor]:
        """The gradients that this process reports to the global norm: each once over all stages."""
        return {
            name: param.grad
            for name, (rank, param) in self.primary.items()
            if param.grad is not None
            and self.mesh.stage_of(rank) == self.homes[name][0]
            and self.mesh.replica_of(rank) == 0
        }

    def gradient_squares(self) -> dict[str, dict[int, float]]:
        """Name -> replica -> the sum of the squares of its rows, of those to be reported here."""
        found: dict[str, dict[int, float]] = {}
        for name, (rank, param) in self.primary.items():
            if param.grad is None or self.mesh.stage_of(rank) != self.homes[name][0]:
                continue
            replica = self.mesh.replica_of(rank)
            if not self._divided(name):
                found[name] = dict(enumerate(squares(param.grad, self.mesh.dp)))
            elif param.grad.dim() or replica == 0:
                found[name] = {replica: own_squares(param.grad)}
        return found

    # -- state dict -------------------------------------------------------------------------

    def state_dict(self, buffer_stage: Mapping[str, int]) -> dict[str, Any]:
        """Full tensors on the CPU under the model's own names; a collective between processes.

        Args:
            buffer_stage: buffers that the forward updates -> the stage that does.
        """
        held: dict[str, torch.Tensor] = {}
        result: dict[str, Any] = {}
        for name, value in self.skeleton.module.state_dict(keep_vars=True).items():
            first = self.skeleton.canonical.get(name)
            if first is None:  # extra state, which is no tensor
                result[name] = value
                continue
            if first not in held:
                stage = self.homes[first][0] if first in self.homes else buffer_stage.get(first, 0)
                held[first] = self._fetch(first, stage, value)
            result[name] = held[first]
        return result

    def _fetch(self, name: str, stage: int, like: torch.Tensor) -> torch.Tensor:
        if self.mesh.distributed and self.zero.divides_states and name in self._shared_out:
            return self._assemble(name, stage, like)
        owner = self.mesh.rank_of(0, stage)
        local = self.ranks.get(owner)
        if local is not None:
            tensor = (local.params if name in self.homes else local.buffers)[name].detach()
        if not self.mesh.distributed:
            return tensor.cpu().clone()
        device = next(iter(self.ranks.values())).device
        if local is None:
            tensor = torch.empty(like.shape, dtype=like.dtype, device=device)
        else:
            tensor = tensor.contiguous()
        dist.broadcast(tensor, owner)
        return tensor.cpu().clone()

    @property
    def _shared_out(self) -> set[str]:
        """The parameters that replicas divide, on any stage."""
        return set(self.homes) if self.zero.divides_params else set(self._sums)

    def _assemble(self, name: str, stage: int, like: torch.Tensor) -> torch.Tensor:
        """A divided parameter from its rows, each told by who owns them."""
        whole = torch.empty(like.shape, dtype=like.dtype)
        device = next(iter(self.ranks.values())).device
        for replica in range(self.mesh.dp if like.dim() else 1):
            rows = rows_of(whole, self.mesh.dp, replica)
            owner = self.mesh.rank_of(replica, stage)
            told = torch.empty(rows.shape, dtype=like.dtype, device=device)
            if owner in self.ranks:
                told.copy_(self._master(owner, name).detach())
            if told.numel():
                dist.broadcast(told, owner)
            rows.copy_(told)
        return whole

    def as_stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What this process holds of a parameter, or of a state of its shape, as checkpoints see
        it: a DTensor where replicas divide it."""
        rank = self._first_local_rank(name) if name in self.homes else None
        shards = None if rank is None else self.ranks[rank].shards
        return tensor if shards is None else shards.as_dtensor(name, tensor)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over tensors from a state dict of the unmodified model.

        Raises:
            StateError: names or shapes that do not fit; nothing has been changed then.
        """
        chosen = self._checked(state)
        for (name, _), param in self.copies.items():
            if name in chosen:
                param.copy_(chosen[name])
        for rank in self.ranks.values():
            if rank.shards is not None:
                rank.shards.load(chosen)
            for name, buffer in rank.buffers.items():
                if name in chosen:
                    buffer.copy_(chosen[name])

    def _checked(self, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        wanted = self.skeleton.module.state_dict(keep_vars=True)
        unexpected = [name for name in state if name not in wanted]
        chosen: dict[str, torch.Tensor] = {}
        for name, value in state.items():
            first = self.skeleton.canonical.get(name)
            if first is None:
                continue
            if tuple(value.shape) != tuple(wanted[name].shape):
                raise StateError(
                    f"{name!r} has shape {list(value.shape)} in the state dict and "
                    f"{list(wanted[name].shape)} in the model"
                )
            if first in chosen and not torch.equal(chosen[first], value):
                raise StateError(f"{name!r} and {first!r} are one tied tensor, with two values")
            chosen[first] = value
        missing = [n for n in wanted if self.skeleton.canonical.get(n, n) not in chosen]
        missing = [n for n in missing if n in self.skeleton.canonical]
        if unexpected or missing:
            raise StateError(
                f"the state dict does not fit the model: missing {missing[:5]}, "
                f"unexpected {unexpected[:5]}"
            )
        return chosen
