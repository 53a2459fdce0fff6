"""Checksums of what is written to disk, so that damage is told when it is read.

XXH3 in 64 bits: it reads at the speed of memory, so that the disk is what takes the time. It tells
accidents, not forgery. Whatever one flipped bit does to it, the chance that it stays is 2⁻⁶⁴.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
import xxhash

_SUM = re.compile(r"[0-9a-f]{16}")
_SEAL = re.compile(rb', "checksum": "([0-9a-f]{16})"\}')
_SEAL_BYTES = len(b', "checksum": "0123456789abcdef"}')


def of_bytes(content: Any) -> str:
    """Of what has the buffer protocol, as 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(content)


def of_tensor(tensor: torch.Tensor) -> str:
    """Of a tensor's elements in order, on the CPU, as they are in memory and in a file."""
    return of_bytes(bytes_of(tensor))


def bytes_of(tensor: torch.Tensor) -> Any:
    """The elements of a tensor in order, as a buffer; copied only where they are elsewhere."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return cast(Any, flat.numpy()).data


def is_sum(value: object) -> bool:
    """Whether something read from a file has the form of a checksum."""
    return isinstance(value, str) and _SUM.fullmatch(value) is not None


def sealed(text: str) -> bytes:
    """A JSON object's text with the checksum of all before it as its last field."""
    content = text.encode()
    assert content.endswith(b"}")
    return content[:-1] + f', "checksum": "{of_bytes(content[:-1])}"}}'.encode()


def seal_of(content: bytes) -> bool | None:
    """Whether a text's checksum is right; None where it has none at its end."""
    found = _SEAL.fullmatch(content[-_SEAL_BYTES:])
    if found is None:
        return None
    return of_bytes(content[:-_SEAL_BYTES]) == found[1].decode()
