"""Through which of its network interfaces a process reaches the others.

Gloo takes the one that the machine's own name stands for. On many systems that is the loopback
(127.0.1.1 in /etc/hosts), or a network that other machines are not in. What all can reach is where
they meet: the way from here to MASTER_ADDR tells the interface. For processes on the machine of
MASTER_ADDR itself that way leads through the loopback, so the others say which address it has.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from collections import Counter
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

CHOICE = "GLOO_SOCKET_IFNAME"
"""The environment variable by which torch is told, and by which users may choose."""

_ADDRESS_OF = 0x8915  # SIOCGIFADDR of Linux
_REQUEST = struct.Struct("16s4x4s232x")  # the name of an interface; its address comes back

_chosen: list[str] = []  # by this process, and not by its user


def choose(store: Any, rank: int, size: int) -> None:
    """Tell torch the interface, unless the user has; a collective of all ranks.

    Where none is found torch goes by the machine's name, as it does by itself.

    Args:
        store: of this attempt alone.
    """
    mine = way_to(os.environ.get("MASTER_ADDR", "localhost"))
    store.set(f"way/{rank}", json.dumps(mine))
    keys = [f"way/{each}" for each in range(size)]
    told = store.multi_get(keys) if store.has_extended_api() else map(store.get, keys)
    name = interface_of(address_here(mine, [tuple(json.loads(each)) for each in told]))
    if os.environ.get(CHOICE, "") not in ("", *_chosen):
        return
    if name:
        os.environ[CHOICE] = name
        _chosen[:] = [name]
    else:
        os.environ.pop(CHOICE, None)


def way_to(name: str) -> tuple[str, str]:
    """The address from which a machine is reached, and that of the machine; "" where there is no
    way. Nothing is sent."""
    with suppress(OSError):
        ways = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)
        for family, kind, protocol, _, address in ways:
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return probe.getsockname()[0], probe.getpeername()[0]
    return "", ""


def address_here(mine: tuple[str, str], told: list[tuple[str, ...]]) -> str:
    """The address at which this process is reached by all; "" where that is not known.

    Args:
        mine: `way_to` MASTER_ADDR from here.
        told: of all ranks.
    """
    source, keeper = mine
    from_afar = Counter(to for start, to in told if start and not _local(start, to))
    if not _local(source, keeper) or not from_afar:
        return source
    return from_afar.most_common(1)[0][0]


def _local(source: str, keeper: str) -> bool:
    """Whether the way does not leave the machine."""
    return source == keeper or not source or ip_address(source.partition("%")[0]).is_loopback


def interface_of(address: str) -> str:
    """The name of the interface with an address of this machine; "" if there is none."""
    if not address or sys.platform != "linux":
        return ""
    if ":" in address:
        wanted = ip_address(address.partition("%")[0]).exploded.replace(":", "")
        with suppress(OSError):
            for line in Path("/proc/net/if_inet6").read_text().splitlines():
                found, *_, name = line.split()
                if found == wanted:
                    return name
        return ""
    return next((name for name in _names() if _address_of(name) == address), "")


def _names() -> list[str]:
    with suppress(OSError):
        return [name for _, name in socket.if_nameindex()]
    return []


def _address_of(name: str) -> str:
    """Of IPv4."""
    import fcntl  # not on every system

    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = _REQUEST.pack(name.encode()[:15], b"")
        answer = fcntl.ioctl(any_socket.fileno(), _ADDRESS_OF, request)
        address: bytes = _REQUEST.unpack(answer)[1]
        return socket.inet_ntoa(address)
    return ""
