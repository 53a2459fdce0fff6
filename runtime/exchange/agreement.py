"""Before ranks work together they make sure that they are about to do the same thing."""

from __future__ import annotations

import ctypes
import pickle
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from ...compiler.capture.batch import BatchSpec
from ...compiler.capture.skeleton import named_state
from ...compiler.driver.compiled import Mode
from ...compiler.ir.errors import (
    BatchError,
    CheckpointError,
    PipecompileError,
    RankMismatchError,
)
from ...compiler.options.options import CompileOptions
from ...compiler.tensors.facts import digest, sample
from ...compiler.tensors.fakes import is_fake
from ..transport.doing import HERE
from ..transport.joining import new_group
from ..transport.mesh import Mesh
from ..transport.neighbours import Neighbours
from . import preemption
from .alike import (
    NO_PACE,
    Call,
    Pace,
    Pieces,
    Texts,
    check_paces,
    differing,
    number_of,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Agreed:
    """The batch that all ranks are about to run.

    Attributes:
        specs: of each replica's share; of one process, of the batch. Those of two replicas may
            differ in all sizes.
        absent: ranks that were given no batch.
        pieces: of each replica, those of its microbatches, where a callable has cut them.
    """

    specs: list[BatchSpec]
    absent: tuple[int, ...] = ()
    pieces: tuple[Pieces, ...] = ()


_ABSENT = -1  # of a rank without a batch, in the place of a hash
MOST_TOLD = 1024  # batches of other ranks that are known; where documents are cut all are new


SMALL = 1024  # bytes that travel in the first collective
_SIZE = 8  # of them, for the number of all


class Agreement:
    """Compares what the processes of a run were given; one process agrees with itself.

    Small values travel over gloo, on CUDA too: reading them must not wait for the device.

    Attributes:
        control: the group over which they do; None for the default one.
        neighbours: all other ranks, if they are of this machine: then the values go there.
        call: what this process is in.
        pace: how the optimizer goes on; told before each batch.
    """

    def __init__(self, mesh: Mesh, device: torch.device):
        self._mesh = mesh
        separate = mesh.distributed and device.type == "cuda"
        self.control = new_group(backend="gloo") if separate else None
        self._others = tuple(each for each in range(mesh.size) if each != mesh.rank)
        self._told: dict[int, tuple[BatchSpec, Pieces | None]] = {}  # of other ranks, by a hash
        self._texts = Texts()
        self.neighbours: Neighbours | None = None
        self.call = Call()
        self.pace = NO_PACE
        self._unheard: list[str] = []  # as `Call.before`

    def take_over(self, neighbours: Neighbours) -> None:
        """Values go to these processes from here on, if they are all that there are."""
        if len(neighbours.ranks) == self._mesh.size - 1:
            self.neighbours = neighbours

    def begin(self, what: str) -> Call:
        """A call of the user's."""
        self.call = Call(what, self.call.number + 1, tuple(self._unheard))
        self.note(what)
        return self.call

    def note(self, what: str) -> None:
        """The user has called something in which nothing may be exchanged: when ranks compare their
        calls next, they compare this too."""
        if self._mesh.distributed:
            self._unheard.append(what)

    def gather(self, value: Any) -> list[Any]:
        """This value of every process, in rank order; one process agrees with itself."""
        if not self._mesh.distributed:
            return [value]
        everyone = self._exchanged((self.call, value))
        self._unheard.clear()  # it is told now, once
        return self._compared(dict(enumerate(everyone)))

    def tell(self, value: Any, speakers: Sequence[int]) -> Callable[[], list[Any]]:
        """What some ranks tell all others, as `gather` has it; what is returned waits for it."""
        me, mine = self._mesh.rank, (self.call, value)
        if me is None:
            return lambda: [value for _ in speakers]
        if self.neighbours is None:
            everyone = self._begun(mine)

            def heard_all() -> list[Any]:
                values = self._compared(dict(enumerate(everyone())))
                return [values[rank] for rank in speakers]

            return heard_all
        told = self.neighbours.tell(mine, speakers)

        def heard() -> list[Any]:
            ranks = {me: mine} | dict(zip(speakers, told(), strict=True))
            self._compared(dict(sorted(ranks.items())))
            return [ranks[rank][1] for rank in speakers]

        return heard

    def report(self, numbers: Sequence[float]) -> Callable[[], list[tuple[float, ...]]]:
        """Tell rank 0 some numbers, as many on all ranks; what is returned gives those of all ranks
        there, and waits for them. No rank waits otherwise.

        Raises:
            ConnectionError: from what is returned, where a rank has ended.
        """
        assert self.neighbours is not None, "other ranks are told what is in a collective anyway"
        form, mine = struct.Struct(f"<{len(numbers)}d"), tuple(numbers)
        heard = self.neighbours.report(form.pack(*mine))
        if not self._mesh.rank:
            return lambda: [mine, *(form.unpack(each) for each in heard().values())]
        return list

    def _exchanged(self, value: Any) -> list[Any]:
        """Of every process, whatever the ranks are about."""
        if self.neighbours is not None:
            return self.neighbours.gather(value)
        return self._begun(value)()

    def _begun(self, value: Any) -> Callable[[], list[Any]]:
        """The same by collectives, one where it is small; what is returned waits, and has to before
        this process begins another."""
        content = pickle.dumps(value)
        size = len(content).to_bytes(_SIZE, "little")
        gathered = self._gathered((size + content)[:SMALL].ljust(SMALL, b"\0"))

        def finished() -> list[Any]:
            first = gathered()
            most = max(int.from_bytes(each[:_SIZE], "little") for each in first)
            rest = [b""] * len(first)
            if most > SMALL - _SIZE:
                rest = self._gathered(content[SMALL - _SIZE :].ljust(most, b"\0"))()
            return [pickle.loads(a[_SIZE:] + b) for a, b in zip(first, rest, strict=True)]

        return finished

    def _gathered(self, content: bytes) -> Callable[[], list[bytes]]:
        """Of every process; all are of one size. What is returned waits."""
        mine = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(self._mesh.size)]
        work = dist.all_gather(everyone, mine, group=self.control, async_op=True)

        def finished() -> list[bytes]:
            with HERE.waiting(self._others):
                work.wait()
            return [ctypes.string_at(each.data_ptr(), each.numel()) for each in everyone]

        return finished

    def _compared(self, told: Mapping[int, tuple[Call, Any]]) -> list[Any]:
        """The values of ranks, if all of these are in the same call."""
        first, (expected, _) = next(iter(told.items()))
        for rank, (call, _) in told.items():
            if call != expected:
                before = differing(first, expected, rank, call)
                raise RankMismatchError(
                    f"rank {first} is in {expected} and rank {rank} in {call}{before}: every rank "
                    "must make the same calls of a pipeline, in the same order"
                )
        return [value for _, value in told.values()]

    def collect(self, value: T) -> list[T] | None:
        """This value of every process, in rank order, on rank 0; None on the others."""
        if not self._mesh.distributed:
            return [value]
        values: list[Any] | None = None if self._mesh.rank else [None] * self._mesh.size
        if self.neighbours is not None:
            values = self.neighbours.collect((self.call, value))
            return None if values is None else self._compared(dict(enumerate(values)))
        with HERE.waiting((0,) if self._mesh.rank else self._others):
            dist.gather_object(value, values, group=self.control)
        return values

    def together(self, act: Callable[[], T], kind: type[PipecompileError] = CheckpointError) -> T:
        """What ``act`` returns here, once it has succeeded on every rank.

        Args:
            kind: what errors that are not pipecompile's own become.

        Raises:
            PipecompileError: what the first rank raised that failed, on every rank.
        """
        result: T | None = None
        error: PipecompileError | None = None
        cause: Exception | None = None
        try:
            result = act()
        except PipecompileError as raised:
            error = cause = raised
        except Exception as raised:
            error, cause = kind(f"{type(raised).__name__}: {raised}"), raised
        first = next((e for e in self.gather(error) if e is not None), None)
        if first is not None:
            raise first from cause
        return cast(T, result)

    def check_batch(
        self,
        mode: Mode,
        spec: BatchSpec | None,
        values: Sequence[torch.Tensor],
        obstacle: PipecompileError | None = None,
        runs: bool = True,
        cuts: Sequence[Pieces] | None = None,
    ) -> Agreed:
        """Every rank is about to run batches that differ in sizes alone, and the stages of a
        replica the same data, or all of them stop here.

        Args:
            spec: None on a rank that has no batch.
            values: the leaves of the batch; a sample of each is compared.
            obstacle: what keeps this rank from running, if anything does.
            runs: or they are compiled for alone.
            cuts: where a callable cuts batches: what it has made of those of the replicas that this
                process has the batches of, or nothing.

        Raises:
            PipecompileError: an obstacle, on all ranks.
            BatchError: no rank of a replica's first stage has a batch.
            RankMismatchError: batches, or data within a replica, differ.
        """
        if not self._mesh.distributed:
            preemption.learn([preemption.heard_here()])
            if obstacle is not None:
                raise obstacle
            if spec is None:
                raise BatchError("the batch is None: give one")
            return Agreed([spec], pieces=tuple(cuts or ()))
        text, number, shape, count = "", _ABSENT, 0, 0
        mine = cuts[0] if cuts else None
        if spec is not None:
            common, text, shape = self._texts.of(mode, spec, mine)
            count, numbers = spec.rows, spec.numbers_in(values) if cuts is None else {}
            text += f" {numbers}" if numbers else ""
            number = number_of(f"{common} {runs} {numbers}")
        data = number_of(" ".join(digest(sample(value)) for value in values))
        pace = self.pace if mode is Mode.TRAIN and runs else NO_PACE
        announced = self._announced(number, data, obstacle is not None, count, shape, *pace)
        programs, batches, stopped, rows, shapes, *paces = announced
        if any(stopped):
            raise next(each for each in self.gather(obstacle) if each is not None)
        absent = tuple(rank for rank, each in enumerate(programs) if each == _ABSENT)
        leaders = [self._mesh.rank_of(replica, 0) for replica in range(self._mesh.dp)]
        if lost := set(leaders).intersection(absent):
            raise BatchError(
                f"rank {min(lost)} was given no batch, and it has the first stage: pipe.needs_data "
                "says which processes need one"
            )
        leader_of = [leaders[self._mesh.replica_of(rank)] for rank in range(self._mesh.size)]
        pairs = zip(shapes, leader_of, programs, strict=True)
        alike = all(each == shapes[led] or made == _ABSENT for each, led, made in pairs)
        self._check_calls(programs if alike or cuts is not None else range(len(programs)), text)
        if not alike:
            self._check_cuts(shapes, absent, text)
        self._check_data(batches, absent)
        check_paces(self._mesh, [Pace(*each) for each in zip(*paces, strict=True)])
        wanted = {shapes[leader_of[rank]] for rank in absent}
        if len({shapes[rank] for rank in leaders}) > 1:
            wanted.update(shapes[rank] for rank in leaders)
        self._tell(wanted, shapes, absent, (spec, mine))
        told: list[Any] = [
            (spec, mine) if shapes[led] == shape else self._told[shapes[led]] for led in leaders
        ]
        specs = [each.with_rows(rows[led]) for (each, _), led in zip(told, leaders, strict=True)]
        return Agreed(specs, absent, tuple(pieces for _, pieces in told if pieces is not None))

    def check_call(self, what: str) -> None:
        """Every rank is about to do the same, that needs no batch of one shape.

        Raises:
            RankMismatchError: another rank is about to do something else.
        """
        if self._mesh.distributed:
            programs, *_ = self._announced(number_of(what), 0, False, 0, 0)
            self._check_calls(programs, what)

    def _announced(self, *mine: Any) -> list[tuple[Any, ...]]:
        """What every rank announces before it runs anything, item by item; the first is a hash of
        what that is. Beside it goes whether the run is to stop."""
        *announced, heard = zip(*self.gather((*mine, preemption.heard_here())), strict=True)
        preemption.learn(heard)
        return announced

    def _check_calls(self, programs: Sequence[int], text: str) -> None:
        if len({each for each in programs if each != _ABSENT}) == 1:
            return
        first, *others = (each for each in self.gather(text) if each)
        for rank, theirs in enumerate(others, 1):
            if theirs != first:
                raise RankMismatchError(
                    f"rank 0 was called with ({first}) and rank {rank} with ({theirs}) per row: "
                    "all ranks must make the same calls, with equal keys, dtypes and numbers of "
                    "dimensions; rows and lengths may differ between replicas"
                )
        raise RankMismatchError("one rank was given a batch and another its shape: give all alike")

    def _check_cuts(self, shapes: Sequence[int], absent: Collection[int], text: str) -> None:
        """Raises RankMismatchError where stages of a replica have cut their batch into others."""
        texts = self.gather(text)
        for rank, shape in enumerate(shapes):
            leader = self._mesh.rank_of(self._mesh.replica_of(rank), 0)
            if shape != shapes[leader] and rank not in absent:
                raise RankMismatchError(
                    f"ranks {leader} and {rank} are stages of one replica, and cut= made "
                    f"({texts[leader]}) of the batch of one and ({texts[rank]}) of that of the "
                    "other: give them the same batch, and let cut= depend on it alone"
                )

    def _tell(
        self, wanted: Collection[int], shapes: Sequence[int], absent: Collection[int], spec: Any
    ) -> None:
        """What ranks need to know of the batches of others; asked for once."""
        if len(self._told) > MOST_TOLD:
            self._told.clear()
        if not set(wanted) <= self._told.keys():
            for rank, each in enumerate(self.gather(spec)):
                if rank not in absent:
                    self._told[shapes[rank]] = each

    def check_outcomes(self, mine: Mapping[int, Sequence[int]]) -> list[Sequence[int]]:
        """Per replica, which graph each of its microbatches runs.

        Args:
            mine: those of the replicas that this process has the batches of.

        Raises:
            RankMismatchError: stages of a replica have found other ones.
        """
        found: dict[int, tuple[int, Sequence[int]]] = {}
        for rank, theirs in enumerate(self.gather(mine)):
            for replica, outcomes in theirs.items():
                first, known = found.setdefault(replica, (rank, outcomes))
                if known != outcomes:
                    raise RankMismatchError(
                        f"ranks {first} and {rank} are stages of one replica, and forward, which "
                        "decides by values of the batch, does so otherwise for the batch of one "
                        "than for that of the other: give them the same batch"
                    )
        return [found[replica][1] for replica in sorted(found)]

    def check_options(self, options: CompileOptions) -> None:
        """Equal options on all ranks, as far as they are declared to be compared."""
        if not self._mesh.distributed:
            return
        first, *others = self.gather(options.compared())
        for rank, theirs in enumerate(others, 1):
            for name, value in theirs.items():
                if value != first[name]:
                    raise RankMismatchError(
                        f"rank {rank} has {name}={value!r}, rank 0 {name}={first[name]!r}: give "
                        "all ranks the same options"
                    )

    def check_ranks(self, fingerprint: str, model: nn.Module, options: CompileOptions) -> None:
        """Equal graphs and weights on all ranks."""
        if not self._mesh.distributed:
            return
        mine = (fingerprint, _digests(model) if options.weights is None else {})
        seen = self.gather(mine)
        for rank, (graph, weights) in enumerate(seen):
            if graph != seen[0][0]:
                raise RankMismatchError(
                    f"rank {rank} captured another graph than rank 0: build the same model, in the "
                    "same mode, on every rank"
                )
            if weights != seen[0][1]:
                name = next(n for n, d in weights.items() if seen[0][1].get(n) != d)
                raise RankMismatchError(
                    f"{name!r} differs between rank 0 and rank {rank}: call torch.manual_seed with "
                    "one seed on all ranks before building the model, or load the same weights"
                )

    def check_copies(self, digests: Mapping[str, str]) -> None:
        """What several ranks hold, or hold rows of, was taken from equal values.

        Args:
            digests: name -> a hash of the whole tensor.
        """
        if not self._mesh.distributed:
            return
        seen: dict[str, tuple[int, str]] = {}
        for rank, others in enumerate(self.gather(digests)):
            for name, other in others.items():
                first, expected = seen.setdefault(name, (rank, other))
                if other != expected:
                    raise RankMismatchError(
                        f"{name!r} differs between rank {first} and rank {rank}: give all machines "
                        "the same files; initialisers may draw from torch's generators only"
                    )

    def _check_data(self, seen: Sequence[int], absent: Collection[int]) -> None:
        for rank, number in enumerate(seen):
            if rank in absent:
                continue
            leader = self._mesh.rank_of(self._mesh.replica_of(rank), 0)
            if number != seen[leader]:
                raise RankMismatchError(
                    f"ranks {leader} and {rank} are stages of one replica but were given different "
                    "data: shard it by pipe.data_shards and pipe.data_shard, not by rank, and let "
                    "every rank read, or skip, the same batches"
                )


def _digests(model: nn.Module) -> dict[str, str]:
    """Name -> a hash of the tensor's values, empty where it has none."""
    return {n: "" if is_fake(t) else digest(sample(t)) for n, t in named_state(model)}
