"""``--set device.FIELD=VALUE``, ``link.FIELD=VALUE`` and ``machine.FIELD=VALUE``: a device with
other figures."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..costs.hardware import Device
from ..costs.topology import Topology, check_figure
from ..ir.errors import OptionError
from ..options.parsing import parse_bytes

PREFIXES = ("device.", "link.", "machine.")
DTYPES = "device.flops_per_s."
Set = Callable[[Device, float], Device]


def _field(name: str) -> Set:
    def change(device: Device, value: float) -> Device:
        changed: Any = {name: value}
        return replace(device, **changed)

    return change


def _network(*names: str) -> Set:
    """Of the link to the next stage, and of those that the table has for collectives."""

    def change(device: Device, value: float) -> Device:
        device = _field(names[0])(device, value)
        if device.table is None:
            return device
        changed: Any = dict.fromkeys(names[1:], value)
        network = replace(device.table.network, **changed)
        return replace(device, table=replace(device.table, network=network))

    return change


def _machine(name: str) -> Set:
    """Of the machines, which are one as long as nobody says how many devices each has."""

    def change(device: Device, value: float) -> Device:
        before = device.topology or Topology(0, device.link_bytes_per_s, device.link_latency_s)
        given: Any = int(value) if name == "devices" and value == int(value) else value
        check_figure(f"--set machine.{name}", name, given)
        return replace(device, topology=replace(before, **{name: given}))

    return change


FIELDS: dict[str, Set] = {
    "device.memory_bytes": lambda device, value: replace(device, memory_bytes=int(value)),
    "device.bytes_per_s": _field("bytes_per_s"),
    "device.launch_s": _field("launch_s"),
    "link.bytes_per_s": _network("link_bytes_per_s", "within_bytes_per_s", "between_bytes_per_s"),
    "link.latency_s": _network("link_latency_s", "within_latency_s", "between_latency_s"),
    "link.send_share": _field("send_share"),
    "link.agree_s": _field("agree_s"),
    **{
        f"machine.{name}": _machine(name)
        for name in ("devices", "bytes_per_s", "latency_s", "oversubscription")
    },
}
MAY_BE_ZERO = (
    "device.launch_s",
    "link.latency_s",
    "link.send_share",
    "link.agree_s",
    "machine.latency_s",
)


def of_device(setting: str) -> bool:
    """Whether it is about the device, and not about the model."""
    return setting.startswith(PREFIXES)


def with_settings(device: Device, settings: Sequence[str]) -> Device:
    """The device with other figures, which its name tells.

    Raises:
        OptionError: there is no such figure, or it cannot be that.
    """
    changed = device
    for setting in settings:
        name, _, text = setting.partition("=")
        if device.cluster is not None and not name.startswith("machine."):
            raise OptionError(
                f"--set {setting}: which of {device.name}? A JSON file may describe each kind of "
                "device, and the machines"
            )
        changed = _of(setting, name)(changed, _number(setting, name, text))
    if changed.topology is not None and not changed.topology.devices:
        raise OptionError(
            "--set machine.…: say how many devices a machine has: --set machine.devices=8"
        )
    if device.cluster is not None and settings:
        return device.cluster.within(changed.topology, settings)
    return changed.changed(settings) if settings else device


def _of(setting: str, name: str) -> Set:
    if name in FIELDS:
        return FIELDS[name]
    if name.startswith(DTYPES):
        dtype = name.removeprefix(DTYPES)
        return lambda device, value: replace(
            device, flops_per_s={**device.flops_per_s, dtype: value}
        )
    known = [*FIELDS, f"{DTYPES}bfloat16"]
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
    raise OptionError(f"--set {setting}: {hint}")


def _number(setting: str, name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float(parse_bytes(text.removesuffix("/s"), f"--set {name}"))
    if not 0 <= number < float("inf") or (number == 0 and name not in MAY_BE_ZERO):
        least = "of 0 or more" if name in MAY_BE_ZERO else "above 0"
        raise OptionError(f"--set {setting}: it must be a number {least}")
    return number
