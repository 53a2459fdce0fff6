"""State that is not a big tensor, as JSON and back: what ``state_dict()`` methods return.

JSON alone has no tuples, bytes or tensors; each becomes ``{"$": kind, ...}``. Nothing else is
taken, so that reading it back can make nothing but these values, and runs no code.
"""

from __future__ import annotations

import base64
from collections import Counter
from typing import Any, cast

import numpy as np
import torch

from ...compiler.ir.errors import CheckpointError
from ..files.tensor_file import DTYPES

_TAG = "$"


def encode(value: Any, where: str) -> Any:
    """A value of numbers, texts, bytes, tensors, arrays, lists, tuples and dicts as JSON data.

    Args:
        where: what the value is, for the error.

    Raises:
        CheckpointError: something else is in it.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (dict, set)) or type(value) in (tuple, torch.Size):
        return _encode_container(value, where)
    if isinstance(value, bytes):
        return {_TAG: "bytes", "data": _text(value)}
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return _encode_array(value, where)
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot keep: let its "
        "state_dict() return numbers, texts, bytes, tensors, and lists, tuples and dicts of them"
    )


def decode(data: Any) -> Any:
    """The value that `encode` was given.

    Raises:
        CheckpointError: data that `encode` does not make.
    """
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict):
        return data
    if _TAG not in data:
        return {key: decode(item) for key, item in data.items()}
    try:
        return _DECODERS[data[_TAG]](data)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint's state is damaged: {error!r}") from error


def _encode_container(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = "set" if isinstance(value, set) else "tuple"
        return {_TAG: kind, "items": encode(list(value), where)}
    plain = not isinstance(value, Counter) and _TAG not in value
    if plain and all(isinstance(key, str) for key in value):
        return {key: encode(item, f"{where}.{key}") for key, item in value.items()}
    kind = "counter" if isinstance(value, Counter) else "dict"
    pairs = [[encode(k, where), encode(v, f"{where}[{k!r}]")] for k, v in value.items()]
    return {_TAG: kind, "items": pairs}


def _encode_array(value: torch.Tensor | np.ndarray[Any, Any], where: str) -> dict[str, Any]:
    is_array = isinstance(value, np.ndarray)
    try:
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value.detach()
        name = next(name for name, (dtype, _) in DTYPES.items() if dtype is tensor.dtype)
    except (TypeError, StopIteration):
        raise CheckpointError(
            f"{where} is an array of {value.dtype}, which a checkpoint cannot keep"
        ) from None
    flat = tensor.cpu().contiguous().view(-1).view(torch.uint8)
    return {
        _TAG: "array" if is_array else "tensor",
        "dtype": name,
        "shape": list(tensor.shape),
        "data": _text(cast(Any, flat.numpy()).tobytes()),
    }


def _decode_tensor(data: dict[str, Any]) -> torch.Tensor:
    raw = bytearray(_bytes(data["data"]))
    dtype = DTYPES[data["dtype"]][0]
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return flat.reshape(data["shape"])


def _pairs(data: dict[str, Any]) -> dict[Any, Any]:
    return {decode(key): decode(value) for key, value in data["items"]}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


_DECODERS: dict[str, Any] = {
    "tuple": lambda data: tuple(decode(data["items"])),
    "set": lambda data: set(decode(data["items"])),
    "dict": _pairs,
    "counter": lambda data: Counter(_pairs(data)),
    "bytes": lambda data: _bytes(data["data"]),
    "tensor": _decode_tensor,
    "array": lambda data: _decode_tensor(data).numpy(),
}
