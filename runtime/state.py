"""The tensors that this process holds: parameters, buffers, gradient buckets; and the state dict.

Each rank's weights are made at compile time, on its device, from a `Source`; the user's model is
not touched and may be deleted. Ranks of one process that share a device share their parameters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..compiler.errors import StateError
from ..compiler.precision import Precision
from ..compiler.program import PipelineProgram
from ..compiler.skeleton import Skeleton
from .bucket import Bucket, GradBucket, GradSlot
from .executor import RankState
from .materialize import Source, materialize
from .mesh import Mesh, device_of


class ModelState:
    """Parameters, buffers and gradients of the ranks that this process plays.

    Args:
        source: what the tensors are filled from.
        homes: parameter FQN -> the stages that hold it.
        device: the type of device; every rank's own is `device_of` it.
        precision: in which dtypes gradients add up.

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
        precision: Precision | None = None,
    ):
        self.skeleton, self.homes, self.mesh = skeleton, homes, mesh
        held = materialize(source, skeleton, self._names(device))
        self.copies: dict[tuple[str, torch.device], nn.Parameter] = {}
        self.primary: dict[str, tuple[int, nn.Parameter]] = {}
        self.ranks: dict[int, RankState] = {}
        trained = {n: p.dtype for n, p in skeleton.module.named_parameters() if p.requires_grad}
        sums = {n: precision.grads_of(d) if precision else d for n, d in trained.items()}
        for rank in mesh.local_ranks:
            stage, where = mesh.stage_of(rank), device_of(rank, device, mesh)
            names = [name for name in skeleton.params if stage in homes[name]]
            params = {name: self._copy(name, held[name, where]) for name in names}
            buffers = {
                name: tensor.clone()
                for (name, place), tensor in held.items()
                if name not in homes and place == where
            }
            slots = {name: p for name, p in params.items() if name in trained}
            grads = GradBucket(slots, sums, where, mesh.dp)
            self.ranks[rank] = RankState(rank, mesh, where, params, buffers, grads)
        for name in skeleton.params:
            first = self._first_local_rank(name)
            if first is not None:
                self.primary[name] = (first, self.ranks[first].params[name])

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
            trained = self.skeleton.module.get_parameter(name).requires_grad
            self.copies[name, tensor.device] = nn.Parameter(tensor, requires_grad=trained)
        return self.copies[name, tensor.device]

    def _first_local_rank(self, name: str) -> int | None:
        return next((r for r in self.ranks if self.mesh.stage_of(r) in self.homes[name]), None)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers of this process, each once."""
        first = next(iter(self.ranks.values()))
        return first.buffers | {name: param for name, (_, param) in self.primary.items()}

    # -- parameters -------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that this process trains, in the model's order, each once."""
        for name, (_, param) in self.primary.items():
            yield name, param

    def provide_copies(self, program: PipelineProgram) -> None:
        """Make room for the copies in the compute dtype that a program reads."""
        for state in self.ranks.values():
            read = program.stages[state.stage].copies
            wanted = {name: dtype for name, dtype in read.items() if name not in state.copies}
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
                narrow.copy_(state.params[name])

    # -- gradients --------------------------------------------------------------------------

    @torch.no_grad()
    def open_gradients(self, scale: float = 1.0) -> None:
        """Before a run: slots take up whatever the user left in ``.grad``; None clears them.

        Args:
            scale: of the loss in this run.
        """
        for rank, state in self.ranks.items():
            for name, slot in state.grads.slots.items():
                first, param = self.primary[name]
                slot.fresh = param.grad is None
                if param.grad is None:
                    continue
                if slot.tensor.dtype is not param.dtype:
                    slot.tensor.copy_(param.grad * scale)
                    continue
                if param.grad is not slot.tensor:
                    slot.tensor.copy_(param.grad)
                if rank == first:
                    param.grad = slot.tensor
        for name, (rank, param) in self.primary.items():
            own = self.ranks[rank].grads.slots.get(name)
            if own is not None and own.tensor.dtype is not param.dtype:
                param.grad = None  # the slot has it
        if scale != 1.0:
            for state in self.ranks.values():
                state.grads.scale(scale)

    def unscale_gradients(self, scale: float) -> bool:
        """Undo the scaling of the loss; narrow sums are widened first, when they are shown.
        Whether all gradients of this process are finite."""
        finite = all(state.grads.is_finite() for state in self.ranks.values())
        for state in self.ranks.values():
            state.grads.scale(1 / scale)
        return finite

    def close_gradients(self, scale: float = 1.0) -> None:
        """After a run: every parameter that got a gradient shows it as ``.grad``."""
        for name, (rank, param) in self.primary.items():
            slot = self.ranks[rank].grads.slots.get(name)
            if slot is not None and not slot.fresh:
                self._show(param, slot, scale)

    def drop_gradients(self) -> None:
        """As if there had been none, so that no optimizer's step changes anything."""
        for state in self.ranks.values():
            state.grads.clear()
        for _, param in self.named_parameters():
            param.grad = None

    @staticmethod
    def _show(param: nn.Parameter, slot: GradSlot, scale: float = 1.0) -> None:
        """torch wants a gradient in its parameter's dtype."""
        same = slot.tensor.dtype is param.dtype
        param.grad = slot.tensor if same else slot.tensor.to(param.dtype).div_(scale)

    def owned_gradients(self) -> dict[str, torch.Tensor]:
        """The gradients that this process reports to the global norm: each once over all stages."""
        return {
            name: param.grad
            for name, (rank, param) in self.primary.items()
            if param.grad is not None
            and self.mesh.stage_of(rank) == self.homes[name][0]
            and self.mesh.replica_of(rank) == 0
        }

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
