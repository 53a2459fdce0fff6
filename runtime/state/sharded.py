"""A rank's share of its stages' parameters, where replicas divide them (zero=1 to 3).

The optimizer holds this rank's rows as ordinary parameters, not as DTensors: an AdamW step over
DTensors takes four times as long, eighteen times if fused, and torch picks no foreach kernels for
them by itself. Checkpoints see the rows as DTensors (`Shards.as_dtensor`), and so reshard them.

What the optimizer holds is a view into the whole parameter where the whole one is kept anyway:
at levels 1 and 2, and of what level 3 keeps, if a program reads it in its own dtype. Where only
the copy in the compute dtype is read, and of what level 3 gathers, the rows stand alone, and there
never is a whole parameter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ...compiler.ir.program import StageProgram
from ...compiler.ir.shards import Owners, Parcel, items_of, parcels_of, rows_of
from ...compiler.tensors.fakes import meta_like
from ..exchange.parcels import GatheredGroup, Gathering
from ..transport.processes import Processes
from ..transport.transport import Endpoint
from .bucket import Bucket


class Shards:
    """The divided parameters of one rank.

    Args:
        params: FQN -> a parameter like the whole one, of all that are divided.
        held: FQN -> its values: of those in ``kept`` all of them, of the others this rank's rows.
        kept: which stay whole on this rank.
        whole_param: tells of a name whether programs find the parameter, or a copy, whole.
        owners: of those that one replica has all rows of.

    Attributes:
        masters: FQN -> this rank's rows.
        whole: FQN -> the parameter in its own dtype, as programs read it, where they find it whole.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        held: Mapping[str, torch.Tensor],
        kept: Collection[str],
        whole_param: Callable[[str], bool],
        endpoint: Endpoint,
        owners: Owners,
    ):
        transport = endpoint.transport
        assert isinstance(transport, Processes)
        self.dp, self.replica, self._device = endpoint.dp, endpoint.replica, endpoint.device
        self._group, self._owners, self._is_whole = transport.group, owners, whole_param
        self._mesh: DeviceMesh | None = None
        self.like = {name: torch.empty_like(meta_like(p)) for name, p in params.items()}
        self.whole = {name: held[name] for name in params if name in kept}
        self.masters: dict[str, nn.Parameter] = {}
        for name, param in params.items():
            rows = self._rows(name, held[name]) if name in self.whole else held[name]
            self.masters[name] = nn.Parameter(rows, requires_grad=param.requires_grad)
        self.copies: dict[str, torch.Tensor] = {}
        self.gathering = Gathering(transport, self.masters, self.like, owners, self._device)
        self._parcels: dict[int, list[tuple[Parcel, Mapping[str, torch.Tensor]]]] = {}
        # stage -> what its programs are the first to read, of ``whole`` and of ``copies``
        self._read: dict[int, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))

    def provide(self, stages: Sequence[StageProgram]) -> None:
        """Make room for what the rank's programs read whole all the time."""
        copied = {name: dtype for stage in stages for name, dtype in self._copied(stage).items()}
        direct = {name for stage in stages for name in self._direct(stage)}
        for name in self.masters:  # in this order on every replica
            if name in direct and name not in self.whole:
                self.whole[name] = torch.empty_like(self.like[name], device=self._device)
        wanted = {
            name: dtype
            for name, dtype in copied.items()
            if name in self.masters and name not in self.copies
        }
        like = {name: self.like[name] for name in wanted}
        self.copies |= Bucket(like, wanted, self._device, self.dp).views
        others: tuple[set[str], set[str]] = (set(), set())  # what a stage before brings
        for stage in stages:
            whole, copies = self._read[stage.stage]
            whole |= self._direct(stage) - others[0]
            copies |= set(self._copied(stage)) - others[1]
            others = others[0] | whole, others[1] | copies
            self._parcels[stage.stage] = [
                (parcel, kind)
                for kind, names in ((self.whole, whole), (self.copies, copies))
                for parcel in parcels_of(
                    items_of(_chosen(kind, names), self._owners).values(), self.dp
                )
            ]

    def _direct(self, stage: StageProgram) -> set[str]:
        return {name for name in stage.direct if self._is_whole(name)}

    def _copied(self, stage: StageProgram) -> dict[str, torch.dtype]:
        return {name: dtype for name, dtype in stage.copies.items() if self._is_whole(name)}

    @torch.no_grad()
    def unshard(self, stage: int) -> None:
        """Every replica's rows to all of them (UNSHARD): one parcel is packed and unpacked while
        another is under way."""
        started: list[Callable[[], None]] = []
        for parcel, kind in self._parcels[stage]:
            pending = self.gathering.start(parcel)
            whole = [kind[item.name] for item in parcel.items]
            started.append(partial(self.gathering.finish, parcel, pending, whole))
            if len(started) > 1:
                started.pop(0)()
        for finish in started:
            finish()

    def groups(self, stage: StageProgram) -> list[GatheredGroup]:
        """What the GROUP ports of a stage stand for."""
        return [GatheredGroup(self.gathering, g, stage.copies) for g in stage.groups]

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over this rank's rows of whole tensors."""
        for name, rows in self.masters.items():
            if name in tensors:
                rows.copy_(self._rows(name, tensors[name]))

    def owns(self, name: str) -> bool:
        """Whether another replica does not own all of a parameter."""
        return self._owners.get(name, self.replica) == self.replica

    def _rows(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return rows_of(whole, self.dp, self.replica, self._owners.get(name))

    def as_dtensor(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a parameter, or of what has its shape, as a part of the whole tensor.

        What has another shape, such as an optimizer's step counter, is returned as it is, and so
        is what one replica owns.
        """
        if (
            name not in self.masters
            or name in self._owners
            or rows.shape != self.masters[name].shape
        ):
            return rows
        if self._mesh is None:
            assert self._group is not None
            self._mesh = DeviceMesh.from_group(self._group, self._device.type)
        like = torch.empty(self.like[name].shape, device="meta")
        place: Placement = Shard(0) if like.dim() else Replicate()
        made: torch.Tensor = DTensor.from_local(
            rows, self._mesh, [place], run_check=False, shape=like.shape, stride=like.stride()
        )
        return made


def _chosen(tensors: Mapping[str, torch.Tensor], names: Collection[str]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name in names}
