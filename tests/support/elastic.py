"""Real runs of torchrun's elastic agents, whose processes are killed and come back.

What stands for a machine is an agent with its workers, and a folder in memory of its own. The store
through which agents meet is this process's, so that any of them may go.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from pipecompile.runtime.elastic.memory import PREFIX, WHERE

from support.gang import free_port
from support.hosts import Host, Network

TRAIN = """
from pipecompile import elastic
import os, signal, sys, time
from functools import partial
import torch

total, stages, options = int(sys.argv[1]), eval(sys.argv[2]), eval(sys.argv[3])
torch.manual_seed(0)
torch.set_num_threads(1)
rows = [{"x": x, "label": x.sum().long() % 4} for x in torch.randn(64, 8)]

def loss_fn(out, batch):
    return torch.nn.functional.cross_entropy(out, batch["label"])

def fail(*_):
    raise ArithmeticError("out of numbers")
signal.signal(signal.SIGUSR2, fail)

def last():
    path = os.environ.get("END", "")
    return int(open(path).read()) if os.path.exists(path) else -1

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layer = lambda: torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
        self.body = torch.nn.Sequential(*(layer() for _ in range(3)), torch.nn.Dropout(0.1))
        self.head = torch.nn.Linear(8, 4)
    def forward(self, x, label):
        return self.head(self.body(x))

with elastic.Session(**options.pop("session", {})) as session:
    pipe = session.compile(
        Model(), stages, global_microbatches=4, seed=3, loss_fn=loss_fn,
        example_batch={"x": torch.zeros(16, 8), "label": torch.zeros(16, dtype=torch.long)},
        optimizer=partial(torch.optim.AdamW, lr=0.01), max_grad_norm=1.0,
        lr_scheduler=partial(torch.optim.lr_scheduler.LinearLR, total_iters=total), **options,
    )
    loader = pipe.loader(rows, batch_size=16, shuffle=True)
    average = pipe.averaged()
    for number, batch in enumerate(session.batches(loader, epochs=total // 4)):
        if pipe.steps == last():
            break
        loss = pipe.step(batch)
        average.update()
        if not number and pipe.is_main:
            again = session.resumed
            print(f"from {again.source or 'nothing'} after {again.passes} "
                  f"as {pipe.plan.n_stages} x {pipe.plan.dp}", flush=True)
        if pipe.is_main:
            drawn = torch.rand(()).item()
            print(f"step {pipe.steps - 1} loss {loss.item().hex()} {drawn}", flush=True)
        time.sleep(0.05)
        gate = os.environ.get("GATE", "/")
        while pipe.steps > total // 2 and not os.path.exists(gate):
            time.sleep(0.05)
"""
"""Prints of each step its loss in full, and a number that the script draws itself. Half way it
waits for the file ``GATE``, and it ends before the step that the file ``END`` says, where these are
given. SIGUSR2 is an error wherever the script is."""

LINE = re.compile(r"step +(\d+) +loss (.*)")
BEGUN = re.compile(r"from (\w+) after (\d+) as (\d+ x \d+)")


@dataclass
class Step:
    """What rank 0 has printed of a step."""

    number: int
    text: str
    at_s: float


@dataclass(frozen=True)
class Begun:
    """What an attempt has said of where it goes on.

    Attributes:
        source: memory, disk or nothing.
        division: as in ``2 x 1``.
        lost: steps that were done before, and are to be done again.
        at_s: when it said so.
    """

    source: str
    passes: int
    division: str
    lost: int
    at_s: float


@dataclass
class Machine:
    """An agent, and the folder in which its workers keep their memory.

    Attributes:
        inside: the agent is a child of what was started.
    """

    number: int
    memory: Path
    agent: subprocess.Popen[str] | None = None
    inside: bool = False

    @property
    def workers(self) -> dict[int, int]:
        """Rank -> process."""
        if self.agent is None:
            return {}
        agents = children(self.agent.pid) if self.inside else [self.agent.pid]
        return {rank: pid for agent in agents for rank, pid in workers_of(agent).items()}


def workers_of(agent: int) -> dict[int, int]:
    found = {}
    children = Path(f"/proc/{agent}/task/{agent}/children")
    with contextlib.suppress(OSError):
        for pid in children.read_text().split():
            with contextlib.suppress(OSError, ValueError):
                content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
                pairs = dict(each.split("=", 1) for each in content.split("\0") if "=" in each)
                if "TORCHELASTIC_RUN_ID" in pairs:
                    found[int(pairs["RANK"])] = int(pid)
    return found


@dataclass
class Run:
    """A script under several agents.

    Attributes:
        fewest: machines without which the agents do not begin.
        steps: all that rank 0 has printed of steps, repeated ones too.
        said: all other lines.
        begun: of each attempt that has taken a step.
    """

    command: Sequence[str]
    folder: Path
    count: int
    fewest: int = 1
    per_machine: int = 1
    restarts: int = 20
    environment: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    begun: list[Begun] = field(default_factory=list)

    def __enter__(self) -> Run:
        self.port = free_port()
        wait = timedelta(seconds=60)
        self._store = dist.TCPStore(
            "localhost", self.port, is_master=True, wait_for_workers=False, timeout=wait
        )
        self._shm = Path(tempfile.mkdtemp(prefix="elastic-test-", dir="/dev/shm"))
        self._threads: list[threading.Thread] = []
        self.machines = [Machine(n, self._shm / f"m{n}") for n in range(self.count)]
        for machine in self.machines:
            self.start(machine)
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            self.stop(machine)
        shutil.rmtree(self._shm, ignore_errors=True)

    def start(self, machine: Machine) -> None:
        """An agent on a machine that has none."""
        machine.memory.mkdir(exist_ok=True)
        command = self._agent(f"localhost:{self.port}", "is_host=false,")
        self._begin(machine, command, {WHERE: str(machine.memory)})

    def _agent(self, endpoint: str, conf: str = "") -> list[str]:
        conf += "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=5"
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d"),
            *(f"--nnodes={self.fewest}:{self.count}", f"--nproc-per-node={self.per_machine}"),
            *(f"--max-restarts={self.restarts}", f"--rdzv-endpoint={endpoint}"),
            *("--rdzv-id=elastic", f"--rdzv-conf={conf}", *self.command),
        ]

    def _begin(self, machine: Machine, command: list[str], more: dict[str, str]) -> None:
        machine.agent = subprocess.Popen(
            command,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            | self.environment
            | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        thread = threading.Thread(target=self._read, args=(machine.agent.stdout,), daemon=True)
        thread.start()
        self._threads.append(thread)

    def _read(self, lines: Sequence[str]) -> None:
        for line in lines:
            found = LINE.match(line)
            if found:
                self.steps.append(Step(int(found[1]), found[2].strip(), time.monotonic()))
            else:
                self.said.append(line.rstrip())
                if begun := BEGUN.match(line):
                    lost = max(0, self.top + 1 - int(begun[2]))
                    now = time.monotonic()
                    self.begun.append(Begun(begun[1], int(begun[2]), begun[3], lost, now))

    def stop(self, machine: Machine) -> None:
        """A machine is gone at once, but for its memory."""
        if machine.agent is not None:
            for pid in (*machine.workers.values(), machine.agent.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            machine.agent.wait()
            machine.agent = None

    def lose(self, machine: Machine) -> None:
        """A machine is gone, with its memory."""
        self.stop(machine)
        shutil.rmtree(machine.memory, ignore_errors=True)

    @property
    def workers(self) -> dict[int, int]:
        """Rank -> process, of all machines."""
        return {r: pid for machine in self.machines for r, pid in machine.workers.items()}

    def machine_of(self, rank: int) -> Machine:
        return next(machine for machine in self.machines if rank in machine.workers)

    def wait_for(self, true: Callable[[], bool], limit_s: float, what: str) -> None:
        """Raises AssertionError, with what was said, where it does not come true."""
        deadline = time.monotonic() + limit_s
        while not true():
            if time.monotonic() > deadline:
                raise AssertionError("\n".join([f"{what} took too long", *self.said[-80:]]))
            time.sleep(0.02)

    def reached(self, step: int, limit_s: float = 120) -> None:
        """Wait for a step that has not been before."""
        self.wait_for(lambda: any(s.number >= step for s in self.steps), limit_s, f"step {step}")

    def restarted(self, times: int, limit_s: float = 120) -> None:
        """Wait until `TRAIN` has begun so often after the first time, and has taken a step."""

        def begun() -> bool:
            return sum(line.startswith("from ") for line in list(self.said)) > times

        self.wait_for(begun, limit_s, f"restart {times}")

    def finished(self, limit_s: float = 120) -> list[int]:
        """Wait for the end; the exit statuses of the agents that were there."""
        agents = [machine.agent for machine in self.machines if machine.agent is not None]
        self.wait_for(lambda: all(a.poll() is not None for a in agents), limit_s, "the end")
        for thread in self._threads:
            thread.join(5)
        return [agent.returncode for agent in agents]

    @property
    def top(self) -> int:
        """The last step that was done; -1 before the first."""
        return max((step.number for step in list(self.steps)), default=-1)

    @property
    def curve(self) -> dict[int, str]:
        """Step -> what was printed of it last."""
        return {step.number: step.text for step in self.steps}

    @property
    def left(self) -> list[str]:
        """What is in the memory of machines."""
        return sorted(str(path) for path in self._shm.glob(f"*/{PREFIX}*"))


@dataclass
class NetworkRun(Run):
    """The same on machines of a network, whose cables can be cut; the first keeps the agents'
    store. Their memory is that of the machines themselves."""

    network: Network | None = None

    def __enter__(self) -> NetworkRun:
        assert self.network is not None
        self._threads = []
        hosts = self.network.hosts
        self.machines = [Machine(host.number, memory_of(host), inside=True) for host in hosts]
        for machine in self.machines:
            self.start(machine)
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            self.stop(machine)

    def start(self, machine: Machine) -> None:
        assert self.network is not None
        host = self.network.hosts[machine.number]
        self._begin(machine, host.command(self._agent("host0:29400")), {})

    def stop(self, machine: Machine) -> None:
        """Its agent is gone, with its workers; the machine stays."""
        if machine.agent is not None:
            for pid in (*children(machine.agent.pid), machine.agent.pid):
                for each in (*children(pid), pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(each, signal.SIGKILL)
            machine.agent.wait()
            machine.agent = None

    @property
    def left(self) -> list[str]:
        return sorted(
            str(path) for machine in self.machines for path in machine.memory.glob(f"{PREFIX}*")
        )


def memory_of(host: Host) -> Path:
    """Of a machine, as it is seen from here."""
    return Path(f"/proc/{host.init}/root/dev/shm")


def children(pid: int) -> list[int]:
    """Processes that it has started."""
    with contextlib.suppress(OSError):
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    return []


def script_of(folder: Path) -> str:
    """`TRAIN` as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.py"
    path.write_text(TRAIN)
    return str(path)
