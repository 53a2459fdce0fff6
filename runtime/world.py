"""This process among the ranks of a run: how it reaches them, and who watches over its work."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..compiler.host.heap import keep_heap
from ..compiler.ir.errors import OptionError, StateError
from ..compiler.kept.cache import default_cache_dir
from ..compiler.options.options import CompileOptions
from ..compiler.planning.target import Target
from ..compiler.profiling.profile import EAGER, Backend, Profiler
from .exchange.agreement import Agreement
from .exchange.alike import Call
from .exchange.devices import device_of, endpoints, ranks_here, target_of
from .exchange.link import hosts_of, measure_agreement, measure_exchange, measured
from .exchange.lookout import lookout_of
from .exchange.watchdog import Watchdog
from .kernels.kernels import compiled_stage
from .kernels.rounding import adding_stage
from .transport.doing import HERE
from .transport.joining import run_store
from .transport.mesh import Mesh, connect
from .transport.neighbours import meet
from .transport.processes import Processes
from .transport.transport import Loopback, Transport


@contextlib.contextmanager
def plain_torch(device: torch.device) -> Iterator[None]:
    """Work without autograd, and without what the caller may have switched on around it.

    What is made here is trained later, so it must not belong to `torch.inference_mode`.

    Raises:
        OptionError: torch.autocast, or another default device, is active: models obey both.
    """
    if torch.is_autocast_enabled(device.type):
        raise OptionError(
            "torch.autocast is active around the pipeline, where it has no part: leave it out, "
            'and give compile() precision="bf16" or "fp16"'
        )
    default = torch.get_default_device()
    if default.type not in ("cpu", device.type):
        raise OptionError(
            f"torch.device({str(default)!r}) is active around a pipeline on {device.type!r}: build "
            "the model in it, and call the pipeline outside"
        )
    with torch.inference_mode(False), torch.no_grad():
        yield


def _backend(options: CompileOptions) -> Backend:
    """Who runs the programs that are measured: as those of the run."""
    if options.fuses:
        return Backend(options.backend, compiled_stage)
    return Backend(EAGER.name, adding_stage) if options.zero in (0, 1) else EAGER


_numbers = itertools.count()
"""Numbers the pipelines of this process; all ranks make them in the same order."""


def _watchdog_of(mesh: Mesh, options: CompileOptions) -> Watchdog | None:
    if mesh.rank is None:
        return None
    lookout = lookout_of(mesh, options.timeout_s)
    return Watchdog(mesh.rank, str(next(_numbers)), run_store(), lookout)


def _guarded_by(
    watchdog: Watchdog | None, what: object, final: bool = False
) -> contextlib.AbstractContextManager[None]:
    """A failure of any rank inside is one of all; of one process alone it is its own."""
    return watchdog.guard(what, final) if watchdog else contextlib.nullcontext()


class Planning:
    """What ranks do together before there is a pipeline, to find out which it will be."""

    def __init__(self, mesh: Mesh, device: torch.device, options: CompileOptions):
        self._mesh, self._device = mesh, device
        connect(mesh, device_of(mesh.local_ranks[0], device, mesh), options.timeout_s)
        self._watchdog = _watchdog_of(mesh, options)

    def guard(self) -> contextlib.AbstractContextManager[None]:
        """Compiling, on all ranks."""
        return _guarded_by(self._watchdog, "compile()")

    def target(self, options: CompileOptions, agreement: Agreement) -> Target:
        """What to plan for, by peak rates; links between machines are measured, where there are
        several and seconds are."""
        mesh, gather = self._mesh, agreement.gather
        target = target_of(options, self._device, mesh, gather)
        if not mesh.distributed:
            return target
        if not options.measures or len(set(hosts_of(gather))) == 1:
            return on_machines(target, mesh, gather)
        here = device_of(mesh.local_ranks[0], self._device, mesh)
        flat = replace(mesh, n_stages=mesh.size, dp=1, placement=())
        links = Processes(flat, here)
        return replace(target, spec=measured(target.spec, flat, here, links, gather))


def on_machines(target: Target, mesh: Mesh, gather: Callable[[Any], list[Any]]) -> Target:
    """The same, with each rank on the machine that it is on, where there are several; what their
    network carries is as ``hardware=`` says. A collective of processes."""
    topology = target.spec.topology
    if not mesh.distributed or topology is None:
        return target
    hosts = hosts_of(gather)
    if len(set(hosts)) == 1:  # that of what is planned for, and not of this run
        return target
    devices = max(map(hosts.count, hosts))
    own, spec = replace(topology, devices=devices, hosts=hosts), target.spec
    if spec.cluster is not None:
        return replace(target, spec=spec.cluster.within(own))
    return replace(target, spec=replace(spec, topology=own))


class World:
    """Joins the other processes, if there are any.

    Options are compared first: what ranks do together from then on depends on them.

    Args:
        device: the type of device; every rank's own is `device_of` it.

    Attributes:
        device: of this process's first rank.
        endpoints: of the ranks that this process plays.
        data_shards, data_shard: as `Pipeline` has them.

    Raises:
        RankMismatchError: on all ranks, where the options of two differ.
    """

    def __init__(
        self,
        mesh: Mesh,
        device: torch.device,
        options: CompileOptions,
    ):
        self.mesh, self._device = mesh, device
        self._here = self.device = device_of(mesh.local_ranks[0], device, mesh)
        self._default_dtype: torch.dtype | None = None  # of what programs make
        self._turn, self._working = threading.RLock(), ""
        connect(mesh, self._here, options.timeout_s)
        if device.type == "cpu":
            keep_heap()
        self._watchdog = _watchdog_of(mesh, options)
        with self.compiling():
            self.agreement = Agreement(mesh, device)
            self.agreement.check_options(options)
            options.check_placement()
            self.transport = self._reached()
        self.endpoints = endpoints(mesh, device, self.transport)
        self.data_shards = mesh.dp if mesh.distributed else 1
        self.data_shard = mesh.replica_of(mesh.rank) if mesh.rank is not None else 0

    def _reached(self) -> Transport:
        """The way to the other ranks."""
        rank = self.mesh.rank
        if rank is None:
            return Loopback()
        neighbours = meet(rank, self.agreement.gather)
        if neighbours is not None:
            self.agreement.take_over(neighbours)
        return Processes(self.mesh, self._here, neighbours)

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, or the only one."""
        return self.mesh.rank in (None, 0)

    @property
    def replicas_here(self) -> int:
        """How many replicas this process cuts its data over."""
        return self.mesh.dp // self.data_shards

    def target(self, options: CompileOptions) -> Target:
        """What to compile for; measures the link where there is one and prices are measured."""
        mesh = self.mesh
        target = target_of(options, self._device, mesh, self.agreement.gather)
        if options.costs == "calibrated" and mesh.distributed:  # all by the table of rank 0
            target = replace(target, spec=self.agreement.gather(target.spec)[0])
        if not options.measures:
            return on_machines(target, mesh, self.agreement.gather)
        beside = ranks_here(mesh) if mesh.distributed else 1
        spec = target.spec
        if mesh.distributed:
            spec = measured(spec, mesh, self._here, self.transport, self.agreement.gather)
            agree_s = measure_agreement(self._here, self.agreement.gather)
            spec = spec.each(lambda each: replace(each, agree_s=agree_s))
        if isinstance(self.transport, Processes) and mesh.dp > 1:
            exchange = measure_exchange(self.transport, self._here, self.agreement.gather)
            spec = spec.each(lambda each: replace(each, exchange=exchange))
        members = spec.cluster.members if spec.cluster is not None else ()
        profilers: dict[str, Profiler] = {}
        for rank in mesh.local_ranks:
            kind = members[rank].name if members else ""
            if kind not in profilers:
                here, folder = device_of(rank, self._device, mesh), default_cache_dir()
                profilers[kind] = Profiler(here, folder, beside=beside, backend=_backend(options))
        return replace(target, spec=spec, profilers=profilers)

    def plain(self) -> contextlib.AbstractContextManager[None]:
        """`plain_torch` for this device."""
        return plain_torch(self._device)

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """A call of the user's, from its beginning to its end; calls inside it are parts of it.

        Raises:
            StateError: another thread is in one; that goes on.
        """
        if not self._turn.acquire(blocking=False):
            raise StateError(
                f"a thread calls {what} while another is in {self._working or 'a call'} of the "
                "same pipeline: call a pipeline from one thread, or hold a threading.Lock"
            )
        before, self._working = self._working, self._working or what
        try:
            yield
        finally:
            self._working = before
            self._turn.release()

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Work, as `plain_torch` has it, in which a failure of any rank is a failure of all.

        Args:
            what: the call that it belongs to, as users write it; the same on all ranks.

        Raises:
            OptionError: the default dtype is another one than in the first call.
            StateError: another thread is in a call of the pipeline.
        """
        with self.alone(what), self._guarded(self.agreement.begin(what)):
            yield

    def compiling(self) -> contextlib.AbstractContextManager[None]:
        """What all ranks do before a pipeline is there; a failure of any is one of all."""
        return _guarded_by(self._watchdog, "compile()")

    @contextlib.contextmanager
    def _guarded(self, what: object, final: bool = False) -> Iterator[None]:
        with _guarded_by(self._watchdog, what, final), self.plain():
            dtype = torch.get_default_dtype()
            if self._default_dtype not in (None, dtype):
                raise OptionError(
                    f"torch's default dtype is {dtype} and was {self._default_dtype} when the "
                    "pipeline was compiled: call torch.set_default_dtype before, and leave it"
                )
            self._default_dtype = dtype
            yield

    @contextlib.contextmanager
    def changing(self, what: str, doing: str) -> Iterator[None]:
        """The rest of a call, which changes parameters, on some ranks before others.

        Where it fails ranks have taken other numbers of steps, and nothing can go on from there.

        Args:
            what: the call.
            doing: what it does to them.
        """
        call = Call(what, self.agreement.call.number)
        with self._guarded(call, final=True), HERE.phase(doing):
            try:
                yield
            except BaseException:
                self.transport.abandon()
                raise
