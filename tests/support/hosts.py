"""Machines of a network, made of Linux namespaces: each has a network, a host name, processes and
memory of its own, and a cable that can be cut, throttled or delayed.

    switch     a namespace with a bridge, and an end of every cable
    host0 …    a namespace each, with the other end as eth0, 10.77.0.1 …

Nothing of it touches the network of the machine itself, and all of it is gone at the end, with all
processes that run there; what a killed process has left, the next one removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_FILES = Path("/etc/netns")  # where `ip netns exec` looks for what a namespace has in /etc
_INIT = 'hostname "$0" && mount -t tmpfs tmpfs /dev/shm && exec sleep infinity'
_TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv", "mount", "hostname")
_PREFIX = "pipecompile-"
_BURSTS = 250  # per second, of a throttled cable: as often as its bucket is filled
_WAIT_S = 20.0  # for a machine to start
_SPACES = 0x00020000 | 0x04000000 | 0x20000000 | 0x40000000  # CLONE_NEW{NS,UTS,PID,NET}
_DEATH_SIGNAL = 1  # of prctl


@functools.cache
def lacking() -> str:
    """Why there can be no such machines here; "" if there can."""
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)}"
    if os.geteuid():
        return "needs root, for network namespaces"
    try:
        with network(1):
            return ""
    except AssertionError as error:
        return f"needs the right to make namespaces: {error}"


def _tried(*command: str) -> str:
    """What a command says if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.strip() or "failed" if done.returncode else ""


def _run(*command: str) -> None:
    if said := _tried(*command):
        raise AssertionError(f"{' '.join(command)}: {said}")


@dataclass
class Host:
    """One machine.

    Attributes:
        space: the name of its network namespace.
        init: the process that all others of it end with; 0 where it is off.
    """

    number: int
    space: str
    name: str
    address: str
    init: int = 0

    def command(self, command: Sequence[str]) -> list[str]:
        """What runs a command on it."""
        within = ("-m", "-u", "-p", "-n", f"--wd={Path.cwd()}")
        return ["nsenter", "-t", str(self.init), *within, *command]


def enter(init: int) -> None:
    """Go on as a process of a machine, which ends with this one; does not return here.

    Args:
        init: that of the machine.
    """
    system = ctypes.CDLL(None, use_errno=True)
    here, machine = Path.cwd(), os.pidfd_open(init)
    if system.setns(machine, _SPACES):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(machine)
    os.chdir(here)
    if child := os.fork():  # the first process with a number of the machine
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    system.prctl(_DEATH_SIGNAL, signal.SIGKILL)


@dataclass
class Network:
    """Some machines, and the cables between them and their switch."""

    switch: str
    hosts: list[Host]
    _inits: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, host: Host) -> None:
        """Switch a machine on."""
        with_this = ("setpriv", "--pdeathsig", "KILL", "--")
        within = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts")
        machine = (*within, "sh", "-c", _INIT, host.name)
        command = [*with_this, "ip", "netns", "exec", host.space, *machine]
        made = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
        self._inits.append(made)
        children = Path(f"/proc/{made.pid}/task/{made.pid}/children")
        deadline = time.monotonic() + _WAIT_S
        while True:
            with contextlib.suppress(OSError):
                if (child := children.read_text().strip()) and _is_up(int(child)):
                    host.init = int(child)
                    return
            if made.poll() is not None or time.monotonic() > deadline:
                made.kill()
                raise AssertionError(f"{host.name}: {made.communicate()[1].decode().strip()}")
            time.sleep(0.01)

    def stop(self, host: Host) -> None:
        """Switch a machine off, with all that runs on it."""
        if host.init:
            os.kill(host.init, signal.SIGKILL)
            host.init = 0

    def cut(self, host: Host) -> None:
        """Its cable is cut: whoever sends hears nothing any more, not even of that."""
        self._cable(host, "down")

    def mend(self, host: Host) -> None:
        """As it was at first: neither cut, throttled nor delayed."""
        for where, cable in self._ends(host):
            _tried("tc", "-n", where, "qdisc", "delete", "dev", cable, "root")
        self._cable(host, "up")

    def throttle(self, host: Host, bytes_per_s: int) -> None:
        """Its cable carries so much, in each direction."""
        rate, burst = f"{8 * bytes_per_s}bit", str(max(1 << 15, bytes_per_s // _BURSTS))
        self._shape(host, "tbf", "rate", rate, "burst", burst, "latency", "400ms")

    def delay(self, host: Host, seconds: float) -> None:
        """What it sends and gets takes so much longer, each.

        Where the kernel cannot hold back packets (netem) the test is skipped.
        """
        try:
            self._shape(host, "netem", "delay", f"{1000 * seconds:g}ms")
        except AssertionError as error:
            if "qdisc kind is unknown" in str(error):
                pytest.skip("this kernel has no netem")
            raise

    def _ends(self, host: Host) -> tuple[tuple[str, str], tuple[str, str]]:
        return (host.space, "eth0"), (self.switch, f"p{host.number}")

    def _cable(self, host: Host, state: str) -> None:
        _run("ip", "-n", self.switch, "link", "set", f"p{host.number}", state)

    def _shape(self, host: Host, *how: str) -> None:
        for where, cable in self._ends(host):
            _run("tc", "-n", where, "qdisc", "replace", "dev", cable, "root", *how)

    def end(self) -> None:
        """Switch all machines off."""
        for host in self.hosts:
            with contextlib.suppress(ProcessLookupError):
                self.stop(host)
        for process in self._inits:
            process.kill()
            process.communicate()


def _is_up(init: int) -> bool:
    return Path(f"/proc/{init}/comm").read_text().strip() == "sleep"


@contextlib.contextmanager
def network(count: int, own_names: str = "") -> Iterator[Network]:
    """So many machines.

    Args:
        own_names: the address that each has for its own name, as some systems have 127.0.1.1; that
            of the network where it is left out.

    Raises:
        AssertionError: they cannot be made.
    """
    _clear()
    run = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(3)}"
    hosts = [Host(n, f"{run}-{n}", f"host{n}", f"10.77.0.{n + 1}") for n in range(count)]
    made = Network(f"{run}-s", hosts)
    with contextlib.ExitStack() as undo:
        undo.callback(_remove, made)
        undo.callback(made.end)
        _lay(made, own_names)
        for host in hosts:
            made.start(host)
        yield made


def _lay(made: Network, own_names: str) -> None:
    """The switch, and a cable from it to each machine."""
    _run("ip", "netns", "add", made.switch)
    _run("ip", "-n", made.switch, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", made.switch, "link", "set", "bridge", "up")
    for host in made.hosts:
        port = f"p{host.number}"
        _run("ip", "netns", "add", host.space)
        ends = ("type", "veth", "peer", "name", "eth0", "netns", host.space)
        _run("ip", "-n", made.switch, "link", "add", port, *ends)
        _run("ip", "-n", made.switch, "link", "set", port, "master", "bridge", "up")
        _run("ip", "-n", host.space, "address", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", host.space, "link", "set", device, "up")
        names = ["127.0.0.1 localhost"] + [
            f"{own_names if own_names and each is host else each.address} {each.name}"
            for each in made.hosts
        ]
        files = _FILES / host.space
        files.mkdir(parents=True)
        (files / "hosts").write_text("\n".join(names) + "\n")
        if Path("/etc/nsswitch.conf").exists():  # no name server can be reached from there
            (files / "nsswitch.conf").write_text("hosts: files\n")


def _remove(made: Network) -> None:
    for space in (*(host.space for host in made.hosts), made.switch):
        _delete(space)


def _delete(space: str) -> None:
    _tried("ip", "netns", "delete", space)  # with its ends of cables
    shutil.rmtree(_FILES / space, ignore_errors=True)
    with contextlib.suppress(OSError):
        _FILES.rmdir()  # unless others use it


def _clear() -> None:
    """Remove what processes have left that are no more; their machines have ended with them."""
    for path in Path("/run/netns").glob(f"{_PREFIX}*"):
        maker = path.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path(f"/proc/{maker}").exists():
            _delete(path.name)
