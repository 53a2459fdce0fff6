"""Measured seconds of programs on the device at hand.

Programs run here as the executor runs them: boxed, under no_grad, on the values that those before
have made; units all forward and then backward in the reverse order, stages in the order of a
schedule, in which what a program reads is as far from the processor as it will be. Programs that
are equal up to names are timed once: a transformer has few kinds of layers.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any, NamedTuple

import torch
from torch import fx

from ..costs.at_hand import device_spec
from ..costs.cost import total_cost
from ..host.caches import other_memory
from ..ir import ops
from ..ir.actions import Kind
from ..ir.checks import unchecked
from ..ir.graph import tensors
from ..ir.program import Port, Program, Role, StageProgram
from ..ir.region import alike
from .synthetic import Synthesizer
from .timing_cache import TimingCache

MIN_ROUNDS, MAX_ROUNDS = 5, 30  # after one to warm up
STEADY = 0.01  # rounds end when the mean is as sure as that, relative
MIDDLE = 1.35  # standard deviations that the middle half of normal samples spans
INTERRUPTED = 1.25  # times the median
OPTIMIZER_BYTES = 64 << 20  # gone through before each step: its first microbatch finds caches so
GROUP_BYTES = 1 << 30  # of arguments: units that take turns, so that each finds cold caches
RUNS = 5  # back to back on CUDA, where one run is too short for its clock


@dataclass(frozen=True)
class UnitTimes:
    """Seconds of one microbatch; backward with the weight gradients.

    Attributes:
        weight_s: of the backward, those that are split off.
    """

    forward_s: float
    backward_s: float
    weight_s: float = 0.0


class Backend(NamedTuple):
    """Who runs programs: a name, and what makes those that run of a stage's."""

    name: str
    compiled: Callable[[StageProgram, torch.device], StageProgram]


EAGER = Backend("eager", lambda stage, _: stage)


@dataclass(eq=False)
class _Unit:
    """A stage program that is being timed.

    Attributes:
        keys: part -> the hash of its program.
        runs: what the backend makes of its programs, as long as it is being timed.
        fixed: what goes into every run.
        begun: what each microbatch under way has made.
    """

    program: StageProgram
    keys: dict[Kind, str]
    runs: StageProgram | None = None
    fixed: dict[Port, Any] = field(default_factory=dict)
    begun: dict[int, dict[Port, Any]] = field(default_factory=dict)

    def end(self) -> None:
        """Give memory back."""
        self.runs = None
        self.fixed.clear()
        self.begun.clear()


class Profiler:
    """Times programs and remembers the times.

    Args:
        device: where to run; this process must not be running anything else there.
        cache_dir: where times are kept between processes (`timing_cache.default_cache_dir`);
            None keeps them in this object only.
        budget_s: when it is used up, what is left gets its roofline seconds times the ratio of
            measured to roofline seconds so far. One round may overrun it.
        beside: processes that measure on this machine at once, this one included.
        backend: who runs the programs; the time that it takes to compile them counts as used.

    Attributes:
        eager: one that times eager kernels: itself, or another one.
        note: what the last call of `times` did, in one line.
    """

    def __init__(
        self,
        device: torch.device,
        cache_dir: Path | None,
        budget_s: float = 60.0,
        beside: int = 1,
        backend: Backend = EAGER,
    ):
        self.device, self.budget_s = device, budget_s
        self.note = ""
        self.eager = self
        if backend.name != EAGER.name:
            self.eager = Profiler(device, cache_dir, budget_s, beside)
        self._spec = device_spec(device)
        self._cache = TimingCache(device, cache_dir, beside, backend.name)
        self._backend = backend

    def runs(self, stage: StageProgram) -> StageProgram:
        """What is timed of a stage's programs; themselves where they have to be compiled for that,
        which takes time."""
        compiles = self._backend.name != EAGER.name
        return stage if compiles else self._backend.compiled(stage, self.device)

    @property
    def told(self) -> str:
        """Where its times are from."""
        return self._cache.name

    def times(
        self,
        programs: Sequence[StageProgram],
        batch: Sequence[torch.Tensor] = (),
        order: Sequence[tuple[int, Kind, int]] = (),
    ) -> list[UnitTimes]:
        """The seconds of each stage program.

        Args:
            batch: the leaves of one microbatch; where not given, indices are zero.
            order: what a step computes: which program, which part of it, for which microbatch.
                Where not given, one microbatch goes through all.
        """
        deadline = time.perf_counter() + self.budget_s
        units = [
            _Unit(program, {k: program_hash(p) for k, p in program.parts.items()})
            for program in programs
        ]
        every = {
            key: p
            for u in units
            for key, p in zip(u.keys.values(), u.program.parts.values(), strict=True)
        }
        roofline = {
            k: total_cost(p.module.graph.nodes, self._spec).seconds for k, p in every.items()
        }
        known = {key: s for key, s in self._cache.seconds.items() if key in every}
        nothing = {key: 0.0 for key, p in every.items() if not _computes(p)}
        chosen = _chosen(units, set(every) - set(known) - set(nothing), roofline)
        steps = [(units[i], part, microbatch) for i, part, microbatch in order]
        samples, failures = self._measure(chosen, roofline, batch, deadline, steps)
        measured = {key: _typical(times) for key, times in samples.items() if key not in known}
        if measured:
            self._cache.add(measured)
        seconds = known | measured | nothing
        ratio = _ratio(seconds, roofline)
        estimated = {key: roofline[key] * ratio for key in every if key not in seconds}
        seconds |= estimated
        self.note = _note(known, measured, estimated, failures, self.budget_s)
        return [_unit_times(unit, seconds) for unit in units]

    def _measure(
        self,
        units: Sequence[_Unit],
        roofline: dict[str, float],
        batch: Sequence[torch.Tensor],
        deadline: float,
        order: Sequence[_Ran],
    ) -> tuple[dict[str, list[float]], list[str]]:
        """Samples per program, and what went wrong with units that could not be run."""
        samples: dict[str, list[float]] = defaultdict(list)
        failures: list[str] = []
        if not units:
            return samples, failures
        left = sum(_expected(unit, roofline) for unit in units)
        synthesizer = Synthesizer(self.device, batch)
        with torch.no_grad(), self._at_home():
            for group in [units] if order else _groups(units):
                now = time.perf_counter()
                if now > deadline:
                    break
                mine = sum(_expected(unit, roofline) for unit in group)
                until = now + (deadline - now) * mine / max(left, 1e-9)
                left -= mine
                self._rounds(group, synthesizer, samples, failures, until, deadline, order)
        return samples, failures

    def _rounds(
        self,
        group: Sequence[_Unit],
        synthesizer: Synthesizer,
        samples: dict[str, list[float]],
        failures: list[str],
        until: float,
        deadline: float,
        order: Sequence[_Ran],
    ) -> None:
        """Run the units of a group: each once, then in order until steady or ``until``."""
        running = []
        for unit in group:
            if time.perf_counter() > deadline:
                break
            try:
                unit.runs = self._backend.compiled(unit.program, self.device)
                unit.fixed = _fixed(unit.program, synthesizer)
                for part in unit.keys:
                    self._run(unit, part, 0, samples)
                running.append(unit)
            except (RuntimeError, IndexError, ValueError, MemoryError) as error:
                first_line = str(error).partition("\n")[0]
                failures.append(f"{type(error).__name__}: {first_line}")
                unit.end()
        own = [each for each in order if each[0] in running] or _one_by_one(running)
        keys = {key for unit in running for key in unit.keys.values() if key in samples}
        others = other_memory(self.device, OPTIMIZER_BYTES if order else 0)
        while keys and time.perf_counter() < until and not _suffices(samples, keys):
            others.add_(1)
            for unit, part, microbatch in own:
                if time.perf_counter() > until or _least(samples, keys) >= MAX_ROUNDS:
                    break
                self._run(unit, part, microbatch, samples)
            for unit in running:
                unit.begun.clear()
        for unit in group:
            unit.end()

    def _run(
        self, unit: _Unit, part: Kind, microbatch: int, samples: dict[str, list[float]]
    ) -> None:
        """A part of a unit, on what the parts before have made."""
        assert unit.runs is not None
        program = unit.runs.parts[part]
        values = unit.begun.setdefault(microbatch, {})
        arguments = [values[p] if p in values else unit.fixed[p] for p in program.inputs]
        for name in unit.program.drops.get((part.value, -1), ()):
            values.pop(Port(Role.VALUE, name), None)
        seconds, made = self._time(program, arguments)
        if _computes(program):
            samples[unit.keys[part]].append(seconds)
        values |= {
            port: value
            for port, value in zip(program.outputs, made, strict=True)
            if port.role is Role.VALUE
        }
        if part is list(unit.keys)[-1]:
            del unit.begun[microbatch]

    def _time(self, program: Program, arguments: list[Any]) -> tuple[float, Sequence[Any]]:
        program.prepare()
        forward = program.module.forward
        if self.device.type != "cuda":
            start = time.perf_counter()
            made = forward(arguments)
            return time.perf_counter() - start, made
        event: Any = torch.cuda.Event
        first, last = event(enable_timing=True), event(enable_timing=True)
        first.record()
        for _ in range(RUNS):
            made = forward(arguments.copy())
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3 / RUNS, made

    @contextlib.contextmanager
    def _at_home(self) -> Iterator[None]:
        """On the device, and with its generators as they were afterwards."""
        with unchecked(), self._on_device():
            yield

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        if self.device.type == "cuda":
            with torch.cuda.device(self.device), torch.random.fork_rng([self.device]):
                yield
        else:
            with torch.random.fork_rng([]):
                yield


def _computes(program: Program) -> bool:
    """Whether it has operators; without any, as a backward of frozen layers is, it has no time."""
    return any(node.op not in ("placeholder", "output") for node in program.module.graph.nodes)


def program_hash(program: Program) -> str:
    """Equal for programs that do the same work: operators, shapes, strides, dtypes and roles.

    Names do not count, nor which parameter or value a port carries, nor the number that tells
    one random operator from another, nor the index of the device.
    """
    digest = hashlib.sha256()
    index: dict[fx.Node, int] = {}
    ports = iter(program.inputs)
    for node in program.module.graph.nodes:
        index[node] = len(index)
        if node.op == "placeholder":
            digest.update(f"{next(ports).role} {_layout(node)}\n".encode())
            continue
        args = node.args[:1] + node.args[2:] if node.target is ops.seeded else node.args
        kwargs = {key: value for key, value in node.kwargs.items() if key != "device"}
        shown = fx.node.map_arg((args, kwargs), lambda n: f"%{index[n]}")
        target = _layout(node) if node.op == "get_attr" else _name(node.target)
        digest.update(f"{node.op} {target} {alike(str(shown))}\n".encode())
    digest.update(repr([port.role for port in program.outputs]).encode())
    return digest.hexdigest()[:32]


def _name(target: Any) -> str:
    """A function's name without its address in memory."""
    return str(target) if " at 0x" not in str(target) else f"{target.__module__}.{target.__name__}"


def _layout(node: fx.Node) -> str:
    value = node.meta.get("val")
    found = [f"{t.dtype}{tuple(t.shape)}{tuple(t.stride())}" for t in tensors(value)]
    return " ".join(found) or repr(value)


def _unit_times(unit: _Unit, seconds: dict[str, float]) -> UnitTimes:
    forward, *backward = (seconds[key] for key in unit.keys.values())
    weight = seconds[unit.keys[Kind.W]] if Kind.W in unit.keys else 0.0
    return UnitTimes(forward, sum(backward), weight)


_Ran = tuple[_Unit, Kind, int]
"""A unit, a part of it, and for which microbatch."""


def _one_by_one(units: Sequence[_Unit]) -> list[_Ran]:
    """A microbatch through all of them: backward finds what the forward made as far from the
    processor as others' forwards have moved it."""
    forward = [(unit, part, 0) for unit in units for part in list(unit.keys)[:1]]
    return forward + [(unit, part, 0) for unit in reversed(units) for part in list(unit.keys)[1:]]


def _fixed(unit: StageProgram, synthesizer: Synthesizer) -> dict[Port, Any]:
    """The arguments of all parts that no earlier part makes."""
    fixed: dict[Port, Any] = {}
    made: set[Port] = set()
    for program in unit.parts.values():
        fixed |= synthesizer.arguments(program, fixed, made)
        made |= {port for port in program.outputs if port.role is Role.VALUE}
    return fixed


def _chosen(units: list[_Unit], missing: set[str], roofline: dict[str, float]) -> list[_Unit]:
    """Units that together have every missing program; those that weigh most in the sum first."""
    count = Counter(key for unit in units for key in unit.keys.values())

    def weight(unit: _Unit) -> float:
        return sum(roofline[key] * count[key] for key in unit.keys.values())

    chosen, covered = [], set[str]()
    for unit in sorted(units, key=weight, reverse=True):
        new = set(unit.keys.values()) & missing - covered
        if new:
            chosen.append(unit)
            covered |= new
    return chosen


def _groups(units: Sequence[_Unit]) -> Iterator[list[_Unit]]:
    """Neighbours whose arguments together take at most `GROUP_BYTES`, or one unit."""
    group: list[_Unit] = []
    held = 0
    for unit in units:
        nbytes = _argument_bytes(unit.program)
        if group and held + nbytes > GROUP_BYTES:
            yield group
            group, held = [], 0
        group.append(unit)
        held += nbytes
    if group:
        yield group


def _argument_bytes(program: StageProgram) -> int:
    """Bytes of all arguments."""
    sizes: dict[Port, int] = {}
    for part in program.parts.values():
        nodes = part.module.graph.find_nodes(op="placeholder")
        for port, node in zip(part.inputs, nodes, strict=True):
            sizes[port] = sum(t.numel() * t.element_size() for t in tensors(node.meta.get("val")))
    return sum(sizes.values())


def _expected(unit: _Unit, roofline: dict[str, float]) -> float:
    return sum(roofline[key] for key in unit.keys.values())


def _least(samples: Mapping[str, Sequence[float]], keys: Collection[str]) -> int:
    """How often the rarest has run, without the first time."""
    return min(len(samples[key]) for key in keys) - 1


def _suffices(samples: Mapping[str, Sequence[float]], keys: Collection[str]) -> bool:
    least = _least(samples, keys)
    enough = least >= MIN_ROUNDS
    return least >= MAX_ROUNDS or (enough and all(_is_steady(samples[key]) for key in keys))


def _is_steady(times: Sequence[float]) -> bool:
    low, middle, high = quantiles(times[1:], n=4)
    return high - low <= STEADY * middle * MIDDLE * math.sqrt(len(times) - 1)


def _typical(times: Sequence[float]) -> float:
    """The mean, as a step is the sum of what its programs take; without the first run, which warms
    up, and those that the machine interrupted, unless there was no other."""
    later = times[1:] or times
    return fmean(each for each in later if each <= INTERRUPTED * median(later))


def _ratio(seconds: dict[str, float], roofline: dict[str, float]) -> float:
    """How much longer programs really take than their roofline says."""
    expected = sum(roofline[key] for key in seconds)
    return sum(seconds.values()) / expected if expected else 1.0


def _note(
    known: dict[str, float],
    measured: dict[str, float],
    estimated: dict[str, float],
    failures: Sequence[str],
    budget_s: float,
) -> str:
    parts = [f"{len(measured)} programs measured, {len(known)} known from before"]
    if estimated:
        why = f"could not be run ({failures[0]})" if failures else f"budget of {budget_s:g} s is up"
        parts.append(f"{len(estimated)} estimated: {why}")
    return "; ".join(parts)
