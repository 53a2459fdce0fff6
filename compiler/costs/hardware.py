"""Device specifications: what a node takes at a device's peak, what fits, what the link carries.

Needs no torch to be imported: the command line lists devices before it loads anything.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from ..calibration.forms import Form
from ..calibration.table import Table
from ..ir.errors import OptionError
from .reserved import AMPERE, CARD, HOPPER, NOTHING, Reserved
from .topology import Exchange, Numbering, Placed, Topology, topology_of

TERA, GIGA, GIB = 1e12, 1e9, 2**30
CHANGED = " with "


@dataclass(frozen=True)
class Device:
    """Peak rates and capacity of one device, and of the link to its neighbour.

    Attributes:
        flops_per_s: torch dtype name ("float32", "bfloat16", ...) -> FLOP/s of dense matrix
            products of such operands; "tf32" is float32 where TF32 is allowed (`with_tf32`).
        bytes_per_s: memory bandwidth.
        memory_bytes: memory capacity, as its driver reports it.
        reserved: what of it is no tensor's.
        link_bytes_per_s: bandwidth of one direction to the next stage.
        link_latency_s: seconds of a message of no bytes.
        launch_s: seconds that one operator costs however small it is.
        send_share: of the seconds of a message, or of an exchange between replicas, those in which
            its sender computes nothing: 0 where the device has engines for it, and where it was
            not measured.
        agree_s: seconds in which all ranks tell each other a small value; 0 where not measured.
        exchange: between the replicas that there are; None where it was not measured.
        table: what kernels and links reach of all that; None for everything, the roofline.
        topology: of the machines that have such devices; None where all are on one, or on a network
            as fast as the link.
        placed: the ranks on these (`with_ranks`); None where they are not known yet.
        cluster: that this device stands for (`Cluster.whole`); None where all are like it.
        ranks: of a replica, the device of each, once that is known; empty where all are like this.
    """

    name: str
    flops_per_s: Mapping[str, float] = field(hash=False)
    bytes_per_s: float
    memory_bytes: int
    link_bytes_per_s: float
    link_latency_s: float
    launch_s: float
    send_share: float = 0.0
    agree_s: float = 0.0
    reserved: Reserved = NOTHING
    exchange: Exchange | None = None
    table: Table | None = None
    topology: Topology | None = None
    placed: Placed | None = None
    cluster: Several | None = None
    ranks: tuple[Device, ...] = ()

    def with_ranks(self, numbering: Numbering) -> Device:
        """The same device, as one of so many ranks.

        Raises:
            OptionError: a cluster has not just as many devices, or they are not alike in replicas.
        """
        if self.cluster is not None:
            return self.cluster.seated(numbering)
        if self.topology is None:
            return self
        return replace(self, placed=Placed(self.topology, numbering))

    def along(self, order: Sequence[str]) -> Device:
        """With ranks that have these kinds of devices; as it is where there is one kind.

        Raises:
            OptionError: the cluster has no such ranks.
        """
        if self.cluster is None or self.cluster.numbering is None or not order:
            return self
        return self.cluster.seated(self.cluster.numbering, order)

    @property
    def order(self) -> tuple[str, ...]:
        """The names of the devices of a replica's ranks; empty where all are like this one."""
        return tuple(device.name for device in self.ranks)

    def at(self, rank: int) -> Device:
        """The device of one of the ranks of a replica."""
        return self.ranks[rank] if self.ranks else self

    def each(self, change: Callable[[Device], Device]) -> Device:
        """Changed; of a cluster every device, and its ranks are not known after that."""
        return change(self) if self.cluster is None else self.cluster.changed(change)

    def fusing(self, fuses: bool) -> Device:
        """As operators without products are compiled together, or run one by one."""
        if self.table is None or self.table.fused == fuses:
            return self
        return self.each(lambda d: replace(d, table=d.table and replace(d.table, fused=fuses)))

    def link(self, src: int, dst: int) -> tuple[float, float]:
        """Bytes per second and latency from one rank of a replica to another, by their places in
        it; of the replica that has the least, and within a machine of the slower device."""
        between = self.placed.message(src, dst) if self.placed is not None else None
        if between is not None or not self.ranks:
            return between or (self.link_bytes_per_s, self.link_latency_s)
        ends = self.ranks[src], self.ranks[dst]
        return min(e.link_bytes_per_s for e in ends), max(e.link_latency_s for e in ends)

    def message_s(self, src: int, dst: int, nbytes: float) -> float:
        """Seconds of a message from one rank of a replica to another."""
        bytes_per_s, latency_s = self.link(src, dst)
        return latency_s + nbytes / bytes_per_s

    @property
    def base(self) -> str:
        """The name without what was changed of the device (`changed`)."""
        return self.name.partition(CHANGED)[0]

    @property
    def is_cpu(self) -> bool:
        """Whether it is the CPU that is described here, or a cluster of such."""
        return (self.cluster.members[0] if self.cluster else self).base == CPU.name

    def changed(self, settings: Sequence[str]) -> Device:
        """Under a name that tells so."""
        return replace(self, name=self.base + CHANGED + " ".join(settings))

    def peak(self, dtype: str) -> float:
        """FLOP/s of a dtype; a dtype without a figure computes as float32."""
        return self.flops_per_s.get(dtype) or self.flops_per_s["float32"]

    def mean_peak(self, dtype: str) -> float:
        """The same of a cluster's devices, as many as there are of each."""
        members = self.cluster.members if self.cluster is not None else (self,)
        return sum(device.peak(dtype) for device in members) / len(members)

    def kernel_s(self, flops: int, moved_bytes: int, dtype: str, form: Form | None = None) -> float:
        """Seconds of one launch: by its table, or the roofline of Williams et al. (CACM 52(4),
        2009), the larger of FLOPs over peak and bytes over bandwidth.

        Args:
            dtype: of its operands.
            form: the shape of its products, where it is known.
        """
        peak = self.peak(dtype)
        if self.table is not None:
            given = flops, moved_bytes, dtype, form, peak, self.bytes_per_s
            return self.table.kernel_seconds(*given)
        return max(flops / peak, moved_bytes / self.bytes_per_s) + self.launch_s

    def least_s(self, flops: int, moved_bytes: int, dtype: str, form: Form | None = None) -> float:
        """What `kernel_s` is never below, however much there is of a kernel of this kind: the best
        rate for its products, or the bandwidth for what has none."""
        if not flops:
            return moved_bytes / self.bytes_per_s
        rate = self.peak(dtype)
        return flops / (rate if self.table is None else rate * self.table.best(dtype, form))

    def program_s(self, kernels_s: float, launches: int) -> float:
        """Seconds of kernels that one program launches one after another."""
        return max(kernels_s, launches * self.table.host_s) if self.table else kernels_s

    def collective_s(self, nbytes: float, ranks: int, messages: int = 1) -> float:
        """Seconds of gathers, or of scatters with sums, between replicas.

        Args:
            nbytes: of all ranks' parts, of all messages.
        """
        known = self.placed.exchange() if self.placed is not None else None
        if self.exchange is not None:
            known = self.exchange.bytes_per_s, self.exchange.latency_s
        if known is not None:
            bytes_per_s, latency_s = known
            return messages * latency_s + nbytes * (ranks - 1) / ranks / bytes_per_s
        if self.table is None:
            return nbytes * (ranks - 1) / ranks / self.link_bytes_per_s
        network = self.table.network
        if self.placed is not None:  # they share a machine
            network = replace(network, per_machine=max(ranks, network.per_machine))
        return messages * network.collective_s(nbytes / max(1, messages), ranks)

    def together_s(self, kernels_s: float, collectives_s: float) -> float:
        """Seconds of kernels with collectives beside them, which take the processor as messages do
        where it has no engines for them."""
        if self.table is None or self.exchange is not None:
            share = self.send_share if self.exchange is None else self.exchange.share
            return max(kernels_s + share * collectives_s, collectives_s)
        return self.table.together_s(kernels_s, collectives_s)

    def waiting(self, ranks: int) -> float:
        """By what a step of so many ranks is multiplied, as they wait for the slowest one."""
        return 1.0 if self.table is None else self.table.waiting(ranks)

    def moved_s(self, nbytes: float) -> float:
        """Seconds in which so much memory is read or written."""
        return nbytes / (self.bytes_per_s * (self.table.memory if self.table else 1))

    def with_link(
        self, bytes_per_s: float, latency_s: float, send_share: float | None = None
    ) -> Device:
        """The same device on another link (one direction)."""
        share = self.send_share if send_share is None else send_share
        return replace(
            self, link_bytes_per_s=bytes_per_s, link_latency_s=latency_s, send_share=share
        )

    def send_s(
        self, transfer_s: Mapping[tuple[int, int], float], homes: Sequence[int]
    ) -> dict[tuple[int, int], float]:
        """Of messages that are under way for so long: seconds in which the sender computes
        nothing.

        Args:
            homes: per stage, its rank.
        """
        return {
            (src, dst): self.at(homes[src]).send_share * seconds
            for (src, dst), seconds in transfer_s.items()
        }

    def with_tf32(self) -> Device:
        """The same device with float32 products in TF32, where it has it."""
        fast = self.flops_per_s.get("tf32", self.peak("float32"))
        return replace(self, flops_per_s={**self.flops_per_s, "float32": fast})


class Several(Protocol):
    """Devices of several kinds, as `cluster.Cluster` has them."""

    @property
    def numbering(self) -> Numbering | None: ...

    @property
    def members(self) -> tuple[Device, ...]: ...

    def orders(self, numbering: Numbering) -> Iterator[tuple[str, ...]]: ...

    def parts(self, name: str) -> tuple[str, ...]: ...

    def seated(self, numbering: Numbering, order: Sequence[str] = ()) -> Device: ...

    def changed(self, change: Callable[[Device], Device]) -> Device: ...

    def within(self, topology: Topology | None, settings: Sequence[str] = ()) -> Device: ...

    def as_they_are(self) -> Device: ...


# Capacities are what drivers report (the least that was found in PyTorch's messages of no memory
# left): HBM has as many GiB as data sheets say GB, an L4's ECC takes its share.
#
# Data sheets give tensor-core rates with 2:4 sparsity and NVLink as both directions together: here
# stands half of either. No data sheet gives latencies: `link_latency_s` is the order of what NCCL's
# send and receive take for a few bytes, `launch_s` that of one eager operator.

_HOPPER = {
    "float64": 67 * TERA,  # tensor cores
    "float32": 67 * TERA,
    "tf32": 989 / 2 * TERA,
    "bfloat16": 1979 / 2 * TERA,
    "float16": 1979 / 2 * TERA,
    "float8_e4m3fn": 3958 / 2 * TERA,
    "float8_e5m2": 3958 / 2 * TERA,
}

H100 = Device(
    "h100",
    _HOPPER,  # NVIDIA H100 data sheet, column SXM
    bytes_per_s=3.35 * TERA,  # the same: HBM3
    memory_bytes=int(79.11 * GIB),
    reserved=HOPPER,
    link_bytes_per_s=900 / 2 * GIGA,  # the same: NVLink 4
    link_latency_s=10e-6,
    launch_s=4e-6,
)

H200 = Device(
    "h200",
    _HOPPER,  # NVIDIA H200 data sheet, column SXM: the rates of the H100
    bytes_per_s=4.8 * TERA,  # the same: HBM3e
    memory_bytes=int(139.72 * GIB),
    reserved=HOPPER,
    link_bytes_per_s=900 / 2 * GIGA,  # the same: NVLink 4
    link_latency_s=10e-6,
    launch_s=4e-6,
)

A100 = Device(
    "a100",
    {  # NVIDIA A100 data sheet, column 80GB SXM; it has no FP8
        "float64": 19.5 * TERA,  # tensor cores
        "float32": 19.5 * TERA,
        "tf32": 312 / 2 * TERA,
        "bfloat16": 624 / 2 * TERA,
        "float16": 624 / 2 * TERA,
    },
    bytes_per_s=2039 * GIGA,  # the same: HBM2e
    memory_bytes=int(79.14 * GIB),
    reserved=AMPERE,
    link_bytes_per_s=600 / 2 * GIGA,  # the same: NVLink 3
    link_latency_s=10e-6,
    launch_s=4e-6,
)

A100_40GB = replace(
    A100,
    name="a100-40gb",
    bytes_per_s=1555 * GIGA,  # NVIDIA A100 data sheet, column 40GB SXM: HBM2
    memory_bytes=int(39.39 * GIB),
)

L4 = Device(
    "l4",
    {  # NVIDIA L4 data sheet
        "float64": 30.3 / 64 * TERA,  # NVIDIA Ada architecture white paper: 1/64 of FP32
        "float32": 30.3 * TERA,
        "tf32": 120 / 2 * TERA,
        "bfloat16": 242 / 2 * TERA,
        "float16": 242 / 2 * TERA,
        "float8_e4m3fn": 485 / 2 * TERA,
        "float8_e5m2": 485 / 2 * TERA,
    },
    bytes_per_s=300 * GIGA,  # the same: GDDR6
    memory_bytes=int(22.03 * GIB),
    reserved=CARD,
    link_bytes_per_s=64 / 2 * GIGA,  # the same: PCIe Gen4 x16, 64 GB/s both directions
    link_latency_s=20e-6,
    launch_s=4e-6,
)

# One core of a current server: 2 AVX-512 FMA units at about 2 GHz reach 128 GFLOP/s on paper, and
# BLAS about 60 % of it; its matrix unit (AMX) is five times as fast in bf16. Memory and link
# (loopback TCP) are what one core can move; the capacity is that of a small machine, which
# `device_spec` replaces by what is there.
CPU = Device(
    "cpu",
    {"float64": 40 * GIGA, "float32": 80 * GIGA, "bfloat16": 400 * GIGA},
    bytes_per_s=10 * GIGA,
    memory_bytes=16 << 30,
    link_bytes_per_s=2 * GIGA,
    link_latency_s=100e-6,
    launch_s=3e-6,
)

DEVICES = {device.name: device for device in (CPU, H100, H200, A100, A100_40GB, L4)}


def parse_device(wanted: str | Path | Device) -> Device:
    """A device by name, from a JSON file with the fields of `Device`, or as it is.

    Raises:
        OptionError: no such device or file, or a file that does not describe a device.
    """
    if isinstance(wanted, Device):
        return wanted
    text = str(wanted)
    if text.lower() in DEVICES:
        return DEVICES[text.lower()]
    path = Path(text).expanduser()
    if path.suffix == ".json" or path.is_file():
        return _from_json(path)
    close = difflib.get_close_matches(text.lower(), DEVICES, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise OptionError(
        f"unknown device {text!r}: {hint}known are {', '.join(DEVICES)}, or give the path of a "
        "JSON file that describes one"
    )


def _from_json(path: Path) -> Device:
    try:
        given = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"device file {path}: {error}") from error
    if not isinstance(given, dict):
        raise OptionError(f"device file {path}: not a JSON object")
    return described(given, f"device file {path}")


def described(given: dict[str, Any], where: str) -> Device:
    """A device from the fields of `Device`.

    Args:
        where: they stand, for messages.

    Raises:
        OptionError: they do not describe one.
    """
    given = dict(given)
    if given.pop("table", None) is not None:
        raise OptionError(
            f"{where}: a table cannot be read from it: give peak rates, and costs= says "
            "what is reached of them"
        )
    later = ("table", "topology", "placed", "exchange", "cluster", "ranks")
    told = [f for f in fields(Device) if f.name not in (*later, "reserved")]
    topology, reserved = given.pop("topology", None), _reserved(given.pop("reserved", {}), where)
    for name in later[2:]:  # of one that was written down: known later
        if name in ("placed", "exchange") or not given.get(name):
            given.pop(name, None)
    known = [f.name for f in told]
    optional = [f.name for f in told if f.default is not MISSING]
    for name in given:
        if name not in known:
            known = [*known, "topology", "reserved"]
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise OptionError(f"{where}: unknown field {name!r}: {hint}")
    for name in known:
        if name not in given and name not in optional:
            raise OptionError(f"{where}: field {name!r} is missing")
    rates = given["flops_per_s"]
    if not isinstance(rates, dict) or "float32" not in rates:
        raise OptionError(
            f"{where}: flops_per_s must map dtype names to FLOP/s, 'float32' among them"
        )
    numbers = {k: v for k, v in given.items() if k not in ("name", "flops_per_s")}
    for name, value in (numbers | {f"flops_per_s[{k!r}]": v for k, v in rates.items()}).items():
        may_be_zero = name in ("link_latency_s", "launch_s", *optional)
        if not _is_number(value) or value < 0 or (value == 0 and not may_be_zero):
            least = "of 0 or more" if may_be_zero else "above 0"
            raise OptionError(f"{where}: {name}={value!r} must be a number {least}")
    own = {"name": str(given["name"]), "memory_bytes": int(given["memory_bytes"])}
    made = Device(**given | own, reserved=reserved)
    if topology is None:
        return made
    return replace(made, topology=topology_of(topology, where))


def _reserved(given: object, where: str) -> Reserved:
    known = [f.name for f in fields(Reserved)]
    if not isinstance(given, dict) or not given.keys() <= set(known):
        raise OptionError(f"{where}: reserved must be an object with {', '.join(known)}")
    for name, value in given.items():
        if not _is_number(value) or value < 0:
            raise OptionError(f"{where}: reserved.{name}={value!r} must be a number of 0 or more")
    return Reserved(**{name: int(value) for name, value in given.items()})


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
