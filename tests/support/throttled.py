"""Two network namespaces with a link of a given speed between them: needs root, `ip` and `tc`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.gang import free_port

ADDRESSES = ("10.77.0.1", "10.77.0.2")
BURST, LATENCY = "512kb", "100ms"  # of the token bucket: more than a packet that segments later


def possible() -> str:
    """Why there can be none here; "" where there can."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing or os.geteuid():
        return f"needs {' and '.join(missing)}" if missing else "needs root"
    tried = subprocess.run(["ip", "netns", "add", _name("try")], capture_output=True, text=True)
    if tried.returncode:
        return tried.stderr.strip()
    _run("ip", "netns", "del", _name("try"))
    return ""


@dataclass(frozen=True)
class Link:
    """Between two namespaces.

    Attributes:
        spaces: their names.
        ports: of each, its end of the link.
    """

    spaces: tuple[str, str]
    ports: tuple[str, str]

    def run(self, script: Path, arguments: Sequence[str], timeout_s: float) -> list[object]:
        """A script in both, as ranks 0 and 1 of a world; the last line of rank 0, as JSON.

        Raises:
            RuntimeError: with what one of them has said.
        """
        port = free_port()
        workers = [
            subprocess.Popen(
                ["ip", "netns", "exec", space, sys.executable, str(script), *arguments],
                env=self._environment(rank, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, space in enumerate(self.spaces)
        ]
        try:
            told = [worker.communicate(timeout=timeout_s) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        for worker, (_, errors) in zip(workers, told, strict=True):
            if worker.returncode:
                raise RuntimeError(errors[-3000:])
        found: list[object] = json.loads(told[0][0].strip().splitlines()[-1])
        return found

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        return os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": self.ports[rank],
            "PIPECOMPILE_SHARED_MEMORY": "off",
            "OMP_NUM_THREADS": "1",
        }


@contextlib.contextmanager
def link(mbit_per_s: int) -> Iterator[Link]:
    """So fast in each direction."""
    spaces, ports = (_name("a"), _name("b")), ("pcl0", "pcl1")
    try:
        for space in spaces:
            _run("ip", "netns", "add", space)
        peer = ("peer", "name", ports[1], "netns", spaces[1])
        _run("ip", "link", "add", ports[0], "netns", spaces[0], "type", "veth", *peer)
        for space, port, address in zip(spaces, ports, ADDRESSES, strict=True):
            _run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", port)
            _run("ip", "-n", space, "link", "set", "lo", "up")
            _run("ip", "-n", space, "link", "set", port, "up")
            bucket = ("rate", f"{mbit_per_s}mbit", "burst", BURST, "latency", LATENCY)
            inside = ("ip", "netns", "exec", space)
            _run(*inside, "tc", "qdisc", "add", "dev", port, "root", "tbf", *bucket)
        yield Link(spaces, ports)
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def sent_on(port: str) -> int:
    """Bytes that have left through a port of this namespace, headers and all."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == port:
            return int(counts.split()[8])
    raise LookupError(port)


def _name(end: str) -> str:
    return f"pipecompile-{os.getpid()}-{end}"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
