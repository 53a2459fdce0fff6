"""What follows the last microbatch of a step: gradients are reduced, parameters are stepped."""

from __future__ import annotations

from collections.abc import Sequence

from ..compression.sizes import Needs
from ..ir import shards
from ..ir.program import PipelineProgram
from ..memory.footprint import Footprint
from ..memory.rank_memory import Static
from .hardware import Device


def exchange_s(
    program: PipelineProgram,
    stages: Sequence[int],
    grad_bytes: int,
    footprint: Footprint,
    device: Device,
    clips: bool,
) -> float:
    """Seconds of tied gradients, of the exchange between replicas that nothing hides, of clipping.

    Without ZeRO the mean is an all-to-all and an all-gather. At level 1 the first half leaves
    beside the last backward (`Timing.late_s`) but for its last parcel, and the parameters are
    gathered; from level 2 on gradients leave beside every backward. What is compressed, or travels
    as rows, takes its own time.

    Args:
        stages: of a rank.
        grad_bytes: of the buffers in which a rank adds them up.
        clips: whether every gradient is read for its norm and scaled.
    """
    dp, zero = footprint.dp, footprint.zero
    tied = [t.name for t in program.tied if set(stages).intersection(t.holders)]
    tied_bytes: float = sum(footprint.size(name)[1] for name in tied)
    if zero.divides_states:
        tied_bytes /= dp if zero.streams else 1
        stepped = footprint.stepped_bytes(program, stages)[1]
        last = min(stepped * dp, shards.parcel_bytes(stepped * dp))
        unshards = sum(footprint.traffic(program, s, stages).unshard_total for s in stages)
        brought = parcels(unshards * dp / (dp + 1))
        sizes = [last, *brought]
    else:
        brought, stepped = [], grad_bytes
        sizes = [*parcels(grad_bytes), *parcels(grad_bytes)]
    needs = footprint.compressed(program, stages)
    exchange_s = 0.0
    if needs.messages:
        exchange_s = compressed_s(needs, dp, device)
        rest = footprint.as_they_are(program, stages)
        sizes = [*parcels(rest), *parcels(rest), *brought]
    exchange_s += device.collective_s(sum(sizes), dp, len(sizes))
    moved = 3 * tied_bytes + (3 * stepped if clips else 0)
    return 2 * tied_bytes / device.link_bytes_per_s + exchange_s + device.moved_s(moved)


def compressed_s(needs: Needs, dp: int, device: Device, share: float = 1.0) -> float:
    """Seconds of compressing gradients, of sending that, and of making them again.

    Args:
        share: of what is needed.
    """
    sent = share * needs.sent_bytes * dp / (dp - 1)  # collectives count all ranks' parts
    linked_s = device.collective_s(sent, dp, needs.messages)
    products_s = share * needs.flops / device.peak("float32")
    return linked_s + products_s + device.moved_s(share * needs.moved_bytes)


def parcels(nbytes: float) -> list[float]:
    """In which so much travels."""
    count = max(1, round(nbytes / shards.PARCEL_BYTES))
    return [nbytes / count] * count if nbytes else []


def optimizer_s(
    held: Static,
    stepped: tuple[int, int],
    footprint: Footprint,
    device: Device,
    left_bytes: int = 0,
) -> float:
    """Seconds in which an optimizer reads and writes what it must: of what replicas divide, its
    share.

    Args:
        stepped: bytes of the weights that it has, and of their gradients.
        left_bytes: of weights and states that no step touches, as their rows have no gradient.
    """
    weights, grads = stepped
    copies = held.copies / (footprint.dp if footprint.zero.divides_states else 1)
    return device.moved_s(2 * weights + copies + grads + 2 * held.states - 2 * left_bytes)
