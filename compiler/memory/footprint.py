"""What a model's parameters, buffers and optimizer take on a stage, whatever runs there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..compression.methods import Method
from ..compression.sizes import Needs, Table, needs, rows_need, whole_bytes
from ..ir.precision import Precision
from ..ir.program import PipelineProgram, StageProgram
from ..ir.shards import (
    Departures,
    Item,
    Owners,
    departures_of,
    homes_in,
    item_of,
    late_gradients,
    owners_of,
    parcels_of,
    row_range,
    shard_numel,
)
from ..ir.zero import NOTHING, WHOLE, Kept, Zero
from . import rank_memory
from .optimizer_cost import OptimizerMemory, optimizer_memory
from .rank_memory import Static, Traffic, bucket_bytes

Measure = Callable[[Callable[..., Any], Mapping[str, torch.Tensor]], OptimizerMemory]


@dataclass(frozen=True)
class Frozen:
    """What a model's frozen parameters would take if they were trained.

    Attributes:
        trained, frozen: elements.
        grad_bytes: of their gradients.
        state_bytes: of the optimizer, at as many per element as the trained ones have.
    """

    trained: int
    frozen: int
    grad_bytes: int
    state_bytes: int


class Footprint:
    """Bytes by parameter name.

    Args:
        module: the model, its tensors fake.
        optimizer: the factory; None for no optimizer.
        precision: in which dtypes gradients add up.
        dp, zero: how many replicas divide what among themselves.
        updated: parameters that are handled as buffers.
        training: whether weights are stepped; else one that is only read as a copy is one.
        measure: tells what the optimizer takes.
        compress: how gradients in fp32 travel between replicas; None for as they are.
        tables: FQN -> how many rows a replica looks up per step, of those whose touched rows alone
            are exchanged.
        stepped_rows: those of them of which the optimizer is given these rows alone.

    Attributes:
        stepped_rows: FQNs.
        buffer_bytes: of all buffers, which every rank has.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None,
        precision: Precision | None = None,
        dp: int = 1,
        zero: Zero = WHOLE,
        updated: Collection[str] = (),
        training: bool = True,
        measure: Measure = optimizer_memory,
        compress: Method | None = None,
        tables: Mapping[str, int] = MappingProxyType({}),
        stepped_rows: Collection[str] = (),
    ):
        self._compress = compress if dp > 1 else None
        self._touched, self.stepped_rows = tables, stepped_rows
        self._tables = tables if dp > 1 else {}
        self.dp, self.zero = dp, zero
        self._precision, self._copied = precision, not training
        self._optimizer, self._measure = optimizer, measure
        named = dict(module.named_parameters())
        self._params = {name: param for name, param in named.items() if name not in updated}
        buffers = (*module.buffers(), *(named[name] for name in updated))
        self.buffer_bytes = sum(b.numel() * b.element_size() for b in buffers)
        self._memories: dict[tuple[str, ...], OptimizerMemory] = {}
        self._stepping: dict[frozenset[str], float] = {}

    def size(self, name: str) -> tuple[int, int]:
        """(elements, bytes) of a parameter."""
        param = self._params[name]
        return param.numel(), param.numel() * param.element_size()

    def owners(self, program: PipelineProgram) -> Owners:
        """Which replica owns which parameter; of nothing where rows are divided."""
        if not self.zero.matrices:
            return {}
        return owners_of(self._params, homes_in(program, self._params), self.dp)

    def held_bytes(
        self, copies: Collection[str] = (), copied_alone: Collection[str] = ()
    ) -> dict[str, int]:
        """Parameter -> weight, its copy if it has one, gradient and optimizer states together.

        Args:
            copies: the parameters that have one.
            copied_alone: those of which nothing else is read.

        Of a parameter that has an owner every replica is taken to hold a share: none holds more
        than others, as all own as much.
        """
        states = self._memory(self._trainable(self._params)).state_bytes
        sharers = self.dp if self.zero.matrices else 1
        copy = self._precision.compute.itemsize if self._precision else 0
        found = {}
        for name, param in self._params.items():
            shard = shard_numel(tuple(param.shape), self.dp)
            own, grad = param.dtype.itemsize, self._grad_dtype(param).itemsize
            count = shard if self._is_shard(name, name not in copies, NOTHING) else param.numel()
            held = 0 if self._copied and name in copied_alone else count * own
            if name in copies and not self.zero.divides_params:
                held += param.numel() * copy
            if param.requires_grad:
                held += (shard if self.zero.divides_grads else param.numel()) * grad
                held += self._needs([name]).residue_bytes
            found[name] = held + states.get(name, 0) // sharers
        return found

    def exchanged_bytes(self, copies: Collection[str] = ()) -> tuple[int, int]:
        """Of what is trained, all together: (as programs read it, gradients)."""
        copy = self._precision.compute.itemsize if self._precision else 0
        trained = {name: self._params[name] for name in self._trainable(self._params)}
        read = sum(
            p.numel() * (copy if name in copies else p.dtype.itemsize)
            for name, p in trained.items()
        )
        return read, sum(p.numel() * self._grad_dtype(p).itemsize for p in trained.values())

    def stepping_bytes(self, copies: Collection[str] = ()) -> float:
        """What a replica's optimizer reads and writes in a step, of all parameters; 0 for none."""
        known = frozenset(copies)
        if known not in self._stepping:
            self._stepping[known] = self._moved_by_steps(known)
        return self._stepping[known]

    def _moved_by_steps(self, copies: Collection[str]) -> float:
        if self._optimizer is None:
            return 0.0
        names = self._trainable(self._params)
        params = [self._stepped(name) for name in names]
        grads = sum(p.numel() * self._grad_dtype(p).itemsize for p in params)
        moved = 2 * sum(p.nbytes for p in params) + grads
        moved += 2 * self._memory(names).total_state_bytes
        copy = self._precision.compute.itemsize if self._precision else 0
        made = copy * sum(self._params[name].numel() for name in names if name in copies)
        shared = self.dp if self.zero.divides_states else 1
        return moved / (self.dp if self.zero.matrices else 1) + made / shared

    def static(self, program: PipelineProgram, stages: Sequence[int], batch_bytes: int) -> Static:
        """What a rank holds all the time; where replicas divide it, that which holds most.

        Args:
            stages: of the rank.
            batch_bytes: of a replica's share of the batch, all microbatches.
        """
        owners, mine = self.owners(program), [program.stages[s] for s in stages]
        alone = program.copied_alone if self._copied else {}
        found = [self._static(mine, batch_bytes, owners, r, alone) for r in self._replicas]
        return max(found, key=lambda static: static.total)

    def _static(
        self,
        stages: Sequence[StageProgram],
        batch_bytes: int,
        owners: Owners,
        replica: int,
        copied_alone: Collection[str],
    ) -> Static:
        params = _union(stage.params for stage in stages)
        names, zero, kept = self._trainable(params), self.zero, stages[0].kept

        def owned(name: str) -> int:
            shape = tuple(self._params[name].shape)
            return shard_numel(shape, self.dp, replica, owners.get(name))

        def weight_bytes(name: str) -> int:
            if name in copied_alone:
                return 0
            shard = self._is_shard(name, name in direct, kept)
            count = owned(name) if shard else self._params[name].numel()
            return count * self._params[name].element_size()

        grads = [
            (p.numel() if zero.whole_grad(n, kept) else owned(n), self._grad_dtype(p))
            for n, p in self._named(names)
            if n not in self._tables
        ]
        copied = {n: dtype for stage in stages for n, dtype in stage.copies.items()}
        whole = {n: dtype for n, dtype in copied.items() if zero.whole_param(n, kept)}
        copies = [(self._params[n].numel(), dtype) for n, dtype in whole.items()]
        direct = {name for stage in stages for name in stage.direct}
        return Static(
            residue=self._needs(names).residue_bytes,
            weights=sum(map(weight_bytes, params)),
            copies=bucket_bytes(copies, self.dp),
            grads=bucket_bytes(grads, 1 if zero.streams else self.dp)
            + sum(self._table(n).bucket_bytes for n in names if n in self._tables),
            states=self._memory(self._stepped_by(names, owners, replica)).total_state_bytes,
            buffers=self.buffer_bytes,
            constants=sum(stage.constant_bytes for stage in stages),
            batch=batch_bytes,
        )

    def optimizer_bytes(self, program: PipelineProgram, stages: Sequence[int]) -> int:
        """What a rank's optimizer needs for a moment, gradients in the weights' dtype too."""

        return max(map(self._moment, self._steppers(program, stages)))

    @property
    def whole_optimizer_bytes(self) -> int:
        """The same of all parameters; 0 where replicas own some of them whole."""
        return 0 if self.zero.matrices else self._moment(self._trainable(self._params))

    def _moment(self, names: tuple[str, ...]) -> int:
        trained = [self._stepped(name) for name in names]
        widened = [p.nbytes for p in trained if self._grad_dtype(p) is not p.dtype]
        return self._memory(names).transient_bytes + sum(widened)

    def traffic(self, program: PipelineProgram, stage: int, mates: Sequence[int]) -> Traffic:
        """What the exchange between replicas takes while a step runs.

        Args:
            mates: the stages of its rank. What several read is brought with the first of them.
        """
        code, extra = program.stages[stage], 0
        if (needs := self.compressed(program, mates)).messages:
            segment = min(self.as_they_are(program, mates), rank_memory.SEGMENT_BYTES)
            extra = max(needs.extra_bytes, segment + segment // self.dp)
        if not self.zero.divides_states:
            return Traffic(compressed_bytes=extra)
        trained, zero = dict(self._named(self._trainable(code.params))), self.zero
        owners = self.owners(program)
        items = {n: item_of(n, p, owners, self._grad_dtype(p)) for n, p in trained.items()}
        departures = Departures()
        if not (needs.messages and zero.closes):
            late = late_gradients(program, stage, mates)
            departures = departures_of(code, items, self.dp, zero, late)
        before = [program.stages[s] for s in mates if s < stage]
        direct = {name for each in before for name in each.direct}
        copies = {name for each in before for name in each.copies}
        wholes: list[list[Item]] = [[], []]
        for name, param in self._named(code.params) if zero.divides_params else trained.items():
            if not zero.whole_param(name, code.kept):
                continue
            if name in code.direct and name not in direct:
                wholes[0].append(item_of(name, param, owners))
            if name in code.copies and name not in copies:
                wholes[1].append(item_of(name, param, owners, code.copies[name]))
        fetched = [p.gather_bytes for kind in wholes for p in parcels_of(kind, self.dp)]
        at_once = max((a + b for a, b in pairwise([0, *fetched])), default=0)
        return Traffic(departures, at_once, sum(fetched), extra)

    def compressed(self, program: PipelineProgram | None, stages: Sequence[int]) -> Needs:
        """What the exchange of a rank's gradients takes, once per step, of those that are
        compressed or of which rows travel: of the replica that sends most.

        Args:
            program: None for all parameters of the model.
        """
        return self._needs(self._summed(program, stages))

    def as_they_are(self, program: PipelineProgram | None, stages: Sequence[int]) -> int:
        """Bytes of the buffers of a rank's other gradients; arguments as of `compressed`."""
        return sum(self._buckets(self._summed(program, stages)))

    def sent_bytes(
        self, program: PipelineProgram, stages: Sequence[int], compress: bool = True
    ) -> int | None:
        """What a rank gives other replicas of its gradients once per step, where they are whole; of
        tables of which rows travel the most that these can take.

        Args:
            compress: what is compressed is, and rows travel; else as if it were not so.
        """
        if self.zero.divides_states:
            return None
        names = self._summed(program, stages)
        exact = sum(whole_bytes(size, self.dp) for size in self._buckets(names, compress))
        return exact + (self._needs(names).sent_bytes if compress else 0)

    def touched(self, program: PipelineProgram, stages: Sequence[int]) -> dict[str, Table]:
        """The tables of a rank of which rows travel, or are stepped, alone."""
        return {n: self._table(n) for n in self._summed(program, stages) if n in self._touched}

    def left_alone_bytes(self, program: PipelineProgram, stages: Sequence[int]) -> int:
        """Of the weights and states of a rank those that no step of the optimizer touches."""
        found = 0.0
        for name in self._summed(program, stages):
            if name in self.stepped_rows:
                rows = self._params[name].shape[0]
                touched = min(1.0, self._touched[name] * self.dp / max(1, rows))
                states = self._memory((name,)).total_state_bytes
                found += (1 - touched) * (self._params[name].nbytes + states)
        return round(found)

    def _summed(self, program: PipelineProgram | None, stages: Sequence[int]) -> tuple[str, ...]:
        """The parameters of a rank that have gradients."""
        if program is None:
            return self._trainable(self._params)
        return self._trainable(_union(program.stages[s].params for s in stages))

    def _buckets(self, names: Iterable[str], compress: bool = True) -> list[int]:
        """Bytes of the buffers in which gradients travel as they are; arguments as of
        `sent_bytes`."""
        whole: dict[torch.dtype, list[tuple[int, torch.dtype]]] = defaultdict(list)
        for name in names:
            dtype = self._grad_dtype(self._params[name])
            others = name in self._tables or (self._compress and dtype is torch.float32)
            if not (compress and others):
                whole[dtype].append((self._params[name].numel(), dtype))
        return [bucket_bytes(each, self.dp) for each in whole.values()]

    def _needs(self, names: Iterable[str]) -> Needs:
        chosen = list(names)
        found = rows_need([self._table(name) for name in chosen if name in self._tables], self.dp)
        params = [self._params[name] for name in chosen if name not in self._tables]
        shapes = [tuple(p.shape) for p in params if self._grad_dtype(p) is torch.float32]
        if self._compress is None or not shapes:
            return found
        return needs(self._compress, shapes, self.dp) + found

    def _table(self, name: str) -> Table:
        param = self._params[name]
        dtype = self._grad_dtype(param)
        rows, size = param.shape[0], param.numel() * dtype.itemsize
        bucket = bucket_bytes([(param.numel(), dtype)], self.dp)
        return Table(rows, size // max(1, rows), bucket, self._touched[name])

    def _is_shard(self, name: str, direct: bool, kept: Kept) -> bool:
        """Whether a replica keeps its own rows of the weight alone."""
        trained, zero = self._params[name].requires_grad, self.zero
        divided = zero.divides_params or (zero.divides_states and trained)
        return divided and not (direct and zero.whole_param(name, kept))

    def _named(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, self._params[name]) for name in names)

    @property
    def _replicas(self) -> range:
        """Those of which one holds most; of rows the first does."""
        return range(self.dp if self.zero.matrices else 1)

    def _steppers(self, program: PipelineProgram, stages: Sequence[int]) -> list[tuple[str, ...]]:
        """What each replica's optimizer has of some stages' parameters."""
        names = self._trainable(_union(program.stages[s].params for s in stages))
        owners = self.owners(program)
        return [self._stepped_by(names, owners, replica) for replica in self._replicas]

    def _stepped_by(self, names: Iterable[str], owners: Owners, replica: int) -> tuple[str, ...]:
        return tuple(name for name in names if owners.get(name, replica) == replica)

    def _stepped(self, name: str) -> torch.Tensor:
        """What the optimizer that has a parameter gets of it, without data."""
        param = self._params[name]
        if not self.zero.divides_states or (self.zero.matrices and param.dim()):
            return param
        shape = (row_range(tuple(param.shape), self.dp, 0)[1], *param.shape[1:])
        return torch.empty(shape if param.dim() else (), dtype=param.dtype, device="meta")

    def trainable(self, program: PipelineProgram, stages: Sequence[int]) -> dict[str, torch.Tensor]:
        """What the optimizer steps of some stages' parameters, without data: of the replica that
        has most."""
        found = ({n: self._stepped(n) for n in names} for names in self._steppers(program, stages))
        return max(found, key=lambda params: sum(p.nbytes for p in params.values()))

    def stepped_bytes(self, program: PipelineProgram, stages: Sequence[int]) -> tuple[int, int]:
        """Of some stages' parameters what the optimizer steps, and their gradients: of the replica
        that has most."""
        params = self.trainable(program, stages).values()
        grads = sum(param.numel() * self._grad_dtype(param).itemsize for param in params)
        return sum(param.nbytes for param in params), grads

    def saved_by_freezing(self) -> Frozen:
        """What parameters that are not trained do not need, of the whole model."""
        trained = [name for name, param in self._params.items() if param.requires_grad]
        frozen = [param for param in self._params.values() if not param.requires_grad]
        states = self._memory(tuple(trained)).state_bytes
        of_trained = sum(self._stepped(name).numel() for name in trained)
        each = sum(states.values()) / of_trained if of_trained else 0.0
        count = sum(param.numel() for param in frozen)
        return Frozen(
            sum(self._params[name].numel() for name in trained),
            count,
            sum(param.numel() * self._grad_dtype(param).itemsize for param in frozen),
            int(each * count),
        )

    def _grad_dtype(self, param: torch.Tensor) -> torch.dtype:
        return self._precision.grads_of(param.dtype) if self._precision else param.dtype

    def _trainable(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in names if self._params[name].requires_grad)

    def _memory(self, names: tuple[str, ...]) -> OptimizerMemory:
        if self._optimizer is None or not names:
            return OptimizerMemory({}, 0, 0)
        if names not in self._memories:
            chosen = {name: self._stepped(name) for name in names}
            try:
                self._memories[names] = self._measure(self._optimizer, chosen)
            except Exception:
                # the factory refuses these parameters, or is none: its own error comes where the
                # optimizer is made; a plan can do with the states of the usual one
                self._memories[names] = self._measure(torch.optim.AdamW, chosen)
        return self._memories[names]


def _union(names: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Each once, in the order in which they come first."""
    return tuple(dict.fromkeys(name for each in names for name in each))
