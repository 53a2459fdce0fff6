"""Random faults of a real run, drawn from a seed, and what has to hold in spite of them.

    killed    SIGKILL of a worker              error    an exception in its script
    stopped   SIGSTOP, for good                paused   SIGSTOP for a second or so
    slow      stopped for most of some seconds full     no file of a worker may grow for a while
    machine   the agent, its workers and their memory; it comes back after a second
    cut       the cable of a machine, where machines have networks (`support.hosts`); it is mended

The same seed draws the same faults, of the same ranks, after the same waits; in which operator they
meet a process is up to the machine.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipecompile.runtime.checkpoint.storage import reading
from pipecompile.runtime.files.index import read_index
from pipecompile.runtime.files.step_folder import find, published

from support.elastic import NetworkRun, Run, Step

KINDS = {"killed": 6, "error": 3, "paused": 3, "slow": 2, "full": 3, "machine": 2, "stopped": 1}
"""Fault -> how often, relative to others."""

OF_NETWORKS = {kind: often for kind, often in KINDS.items() if kind != "machine"} | {"cut": 4}
"""The same for machines of a network, the first of which keeps the agents' store."""

QUIET = ("paused", "slow", "full", "cut")
"""After which no process has to be started anew."""

TIMEOUT_S = 10.0  # of a stall; longer than one rank compiles alone
NAMED_S = TIMEOUT_S + 8  # in which it has to be named: a loaded machine looks late
BACK_S = 300.0  # in which a run has to go on, whatever happened
SETTLED_S = 0.5  # after a fault that ends by itself, for what comes of it
AHEAD = 12  # steps from the order to end to the last one


@dataclass(frozen=True)
class Fault:
    """One that is drawn.

    Attributes:
        rank: whose process, or machine.
        wait_s: from the first new step after the fault before, or at once after that if ``soon``.
        lasts_s: of what ends by itself.
    """

    kind: str
    rank: int
    wait_s: float
    soon: bool
    lasts_s: float

    def __str__(self) -> str:
        when = "soon" if self.soon else "later"
        return f"{self.kind} rank {self.rank}, {self.wait_s:.2f} s {when}, for {self.lasts_s:.1f} s"


def drawn(seed: int, ranks: int, often: Mapping[str, int] = KINDS) -> Iterator[Fault]:
    """Endlessly."""
    chance = random.Random(seed)
    kinds, weights = list(often), list(often.values())
    while True:
        kind = chance.choices(kinds, weights)[0]
        soon = chance.random() < 0.2 and kind != "stopped"
        wait_s, lasts_s = chance.uniform(0, 1.5), chance.uniform(0.5, 3.0)
        yield Fault(kind, chance.randrange(ranks), wait_s, soon, lasts_s)


@dataclass
class Outcome:
    """Of one fault.

    Attributes:
        back_s: the longest that the run took no new step, until it had gone on; 0.0 where another
            fault came.
        repeated: steps that were done twice for it.
        named_s: until a stall was named.
        told: the first line before that step which names the rank, or says that a disk is full.
    """

    fault: Fault
    back_s: float = 0.0
    repeated: int = 0
    named_s: float | None = None
    told: str = ""


@dataclass
class Chaos:
    """Faults of a run, one after the other.

    Args:
        names: whether the run is one that names whoever is stopped; that is waited for then.

    Attributes:
        wrong: what ought not to be.
        ended: whether the run has, as it was told.
    """

    run: Run
    directory: Path
    names: bool = True
    outcomes: list[Outcome] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    newest: int = -1
    ended: bool = False

    def one(self, fault: Fault) -> None:
        """Wait, do it, and wait until the run has gone on, unless the next comes soon."""
        time.sleep(fault.wait_s)
        begun_s, steps, top = time.monotonic(), len(self.run.steps), self.run.top
        said, attempts = len(self.run.said), len(self.run.begun)
        outcome = Outcome(fault)
        self.outcomes.append(outcome)
        met = self._happen(fault, outcome)
        anew = met and fault.kind not in QUIET
        over_s = time.monotonic() + SETTLED_S

        def gone_on() -> bool:
            after_s = over_s
            if anew:
                if len(self.run.begun) == attempts:
                    return False
                after_s = self.run.begun[-1].at_s
            return any(s.at_s > after_s for s in _new(list(self.run.steps)[steps:], top))

        self.run.wait_for(gone_on, BACK_S, f"going on after: {fault}")
        times = [begun_s, *(s.at_s for s in _new(list(self.run.steps)[steps:], top))]
        outcome.back_s = max(later - earlier for earlier, later in pairwise(times))
        since = [s.number for s in list(self.run.steps)[steps:]]
        outcome.repeated = sum(number <= top for number in since)
        outcome.told = _telling(list(self.run.said)[said:], fault)
        self.look()

    def look(self) -> None:
        """Nothing that was published is lost."""
        if not self.directory.is_dir():
            return
        steps = published(self.directory)
        if self.newest >= 0 and max(steps, default=-1) < self.newest:
            self.wrong.append(f"step {self.newest} was published, and there are {list(steps)}")
        self.newest = max(steps, default=self.newest)

    def _happen(self, fault: Fault, outcome: Outcome) -> bool:
        """Whether it met anything."""
        pid = self._process(fault.rank)
        with contextlib.suppress(ProcessLookupError):
            if fault.kind == "machine":
                machine = self.run.machines[fault.rank % len(self.run.machines)]
                self.run.lose(machine)
                time.sleep(1.0)
                self.run.start(machine)
            elif fault.kind == "cut":
                self._cut(fault)
            elif pid is None:
                return False  # it was being started anew: the fault before is still at work
            elif fault.kind == "killed":
                os.kill(pid, signal.SIGKILL)
            elif fault.kind == "error":
                os.kill(pid, signal.SIGUSR2)
            elif fault.kind == "paused":
                _paused(pid, fault.lasts_s)
            elif fault.kind == "slow":
                for _ in range(int(fault.lasts_s * 5)):
                    _paused(pid, 0.15)
                    time.sleep(0.05)
            elif fault.kind == "full":
                _full(pid, fault.lasts_s)
            else:
                self._stopped(pid, fault, outcome)
            return True
        return False

    def _cut(self, fault: Fault) -> None:
        """For less than the agents need to miss each other."""
        assert isinstance(self.run, NetworkRun)
        network = self.run.network
        assert network is not None
        host = network.hosts[fault.rank % len(network.hosts)]
        network.cut(host)
        time.sleep(fault.lasts_s)
        network.mend(host)

    def _stopped(self, pid: int, fault: Fault, outcome: Outcome) -> None:
        """It is named by another rank, and then ended."""
        before, begun_s = len(self.run.said), time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        if not self.names:
            return

        def named() -> bool:
            return any(
                f"rank {fault.rank} (" in line and "longer than timeout_s" in line
                for line in list(self.run.said)[before:]
            )

        try:
            self.run.wait_for(named, NAMED_S, f"naming rank {fault.rank}")
            outcome.named_s = time.monotonic() - begun_s
        except AssertionError:
            self.wrong.append(f"rank {fault.rank} was stopped, and not named in {NAMED_S:.0f} s")

    def _process(self, rank: int) -> int | None:
        """Of a rank that has said that it trains."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if rank in (workers := self.run.workers):
                return workers[rank]
            time.sleep(0.05)
        return None


def _new(steps: Sequence[Step], top: int) -> list[Step]:
    """Those of steps that had not been done before."""
    found = []
    for step in steps:
        if step.number > top:
            found.append(step)
            top = step.number
    return found


_FULL = re.compile("File too large|No space left|no room|without a checkpoint")


def _telling(said: Sequence[str], fault: Fault) -> str:
    """The first line that says whom, or what, a fault has met; "" for none."""
    rank = re.compile(rf"\brank:? ?{fault.rank}\b", re.IGNORECASE)
    about = _FULL if fault.kind == "full" else rank
    return next((line for line in said if about.search(line)), "")


def _paused(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)


def _full(pid: int, seconds: float) -> None:
    """No file of a process grows; what is in memory already may be written over."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def endured(
    run: Run,
    directory: Path,
    end: Path,
    faults: list[Fault],
    minutes: float,
    tell: Callable[[str], None],
    names: bool = True,
) -> Chaos:
    """Let faults happen to a run until they or the minutes are over, and let it end.

    Args:
        tell: is told of each fault, and of what came of it.
        names: as `Chaos` has it.
    """
    chaos = Chaos(run, directory, names)
    try:
        _suffer(chaos, faults, time.monotonic() + 60 * minutes, tell)
        draft = end.with_suffix(".draft")
        draft.write_text(str(run.top + AHEAD))
        draft.replace(end)
        statuses = run.finished(BACK_S)
    except AssertionError as error:
        tell(str(error))
        chaos.wrong.append(str(error).partition("\n")[0])
        return chaos
    chaos.ended = True
    if set(statuses) != {0}:
        chaos.wrong.append(f"agents ended with {statuses}")
    if run.left:
        chaos.wrong.append(f"in memory is left {run.left}")
    chaos.look()
    _check_newest(chaos)
    return chaos


def _suffer(
    chaos: Chaos, faults: list[Fault], deadline: float, tell: Callable[[str], None]
) -> None:
    """Raises AssertionError where the run does not go on after one."""
    chaos.run.reached(1)
    for fault, following in zip(faults, [*faults[1:], None], strict=True):
        if time.monotonic() > deadline:
            break
        tell(f"{len(chaos.outcomes):3d} at step {chaos.run.top}: {fault}")
        if following is not None and following.soon:
            # the next one meets a run that is still going on from this
            outcome = Outcome(fault)
            chaos.outcomes.append(outcome)
            time.sleep(fault.wait_s)
            chaos._happen(fault, outcome)
        else:
            chaos.one(fault)
            tell(f"    {chaos.outcomes[-1]}")


def _check_newest(chaos: Chaos) -> None:
    """The newest checkpoint can be read, every byte of it."""
    if not list(chaos.directory.glob("step-*")):
        return  # not of this library
    folder = find(chaos.directory)
    index = read_index(folder)
    with reading(folder, index) as read:
        for name in index.tensors:
            read(name)


def compared(curve: dict[int, str], expected: dict[int, str]) -> list[str]:
    """Where a curve is another than that of a run to which nothing happened."""
    if curve.keys() != expected.keys():
        missing = sorted(expected.keys() ^ curve.keys())
        return [f"steps {missing[:9]} are in one curve alone"]
    return [
        f"step {n}: {curve[n]} and not {expected[n]}" for n in curve if curve[n] != expected[n]
    ][:5]


def summary(chaos: Chaos) -> dict[str, Any]:
    """The figures, for people."""
    kinds = Counter(outcome.fault.kind for outcome in chaos.outcomes)
    timed = [o for o in chaos.outcomes if o.back_s]
    sources = Counter(begun.source for begun in chaos.run.begun)
    back = {
        kind: sorted(round(o.back_s, 1) for o in timed if o.fault.kind == kind) for kind in kinds
    }
    named = [o.named_s for o in chaos.outcomes if o.named_s is not None]
    return {
        "faults": dict(kinds),
        "steps": len(chaos.run.curve),
        "begun from": dict(sources),
        "most steps that an attempt went back": max((b.lost for b in chaos.run.begun), default=0),
        "repeated steps": len(chaos.run.steps) - len(chaos.run.curve),
        "most repeated after one fault": max((o.repeated for o in timed), default=0),
        "seconds until the next step, median and most": {
            kind: (statistics.median(each), each[-1]) for kind, each in back.items() if each
        },
        "seconds until a stall was named": [round(each, 1) for each in named],
        "checkpoints published until step": chaos.newest,
        "wrong": chaos.wrong,
    }
