"""The forms in which batches come, as structures of tensors and of values that programs are for.

Data sets give arrays, lists and texts; tokenizers and collators mappings and classes of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from numbers import Number
from typing import Any

import numpy as np
import torch

from ..ir.errors import BatchError
from ..tensors.pytree import is_known, register_dataclass


class _Texts:
    """In the place of a list with a text, or nothing, for each row."""


_TEXTS = _Texts()


def plain(batch: Any) -> tuple[Any, tuple[str, ...]]:
    """A batch of tensors, and the keys of what was left out, as no graph can take it.

    Mappings become dicts, and dataclasses do; those inside of others keep their class. Arrays
    become tensors in their memory. A list with one number for each row, or one list of as many
    numbers, becomes a tensor; a tuple stays what it is. A list with one text for each row is left
    out.

    Raises:
        BatchError: an array, or a list with an item for each row, that no tensor can hold.
    """
    if isinstance(batch, Mapping):
        batch = dict(batch)
    elif _is_record(batch):
        fields = dataclasses.fields(batch)
        batch = {field.name: getattr(batch, field.name) for field in fields}
    elif isinstance(batch, list):
        batch = tuple(batch)
    made = _structured(batch, ())
    rows = _rows(made)
    left_out: list[str] = []
    return (made if rows is None else _by_rows(made, rows, (), left_out)), tuple(left_out)


def _structured(value: Any, path: tuple[str, ...]) -> Any:
    """With the structures and arrays that `pytree` does not know as those that it does."""
    if isinstance(value, np.ndarray):
        return _tensor(value, path)
    if type(value) in (dict, list, tuple) or isinstance(value, tuple):
        return _mapped(value, path, _structured)
    if is_known(value):
        return value
    if isinstance(value, Mapping):
        return _mapped(dict(value), path, _structured)
    if _is_record(value) and any(map(_has_tensors, vars(value).values())):
        register_dataclass(type(value))
    return value


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (
        isinstance(value, (list, tuple)) and any(map(_has_tensors, value))
    )


def _mapped(value: Any, path: tuple[str, ...], change: Any) -> Any:
    """A dict, list or tuple, with its items changed."""
    if isinstance(value, dict):
        return {key: change(item, (*path, str(key))) for key, item in value.items()}
    items = [change(item, (*path, str(i))) for i, item in enumerate(value)]
    if hasattr(value, "_fields"):
        return type(value)(*items)
    return items if isinstance(value, list) else tuple(items)


def _tensor(array: np.ndarray[Any, Any], path: tuple[str, ...]) -> Any:
    if array.dtype.kind in "OSUT":
        return array.tolist()
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise BatchError(
            f"the batch's {_named(path)} is an array of {array.dtype}, which no tensor can hold: "
            "convert it"
        ) from error


def _rows(value: Any) -> int | None:
    """Of the first tensor that has dimensions."""
    if isinstance(value, torch.Tensor):
        return None if value.is_nested or not value.dim() else value.shape[0]
    items = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list, tuple)):
        return None
    return next((found for found in map(_rows, items) if found is not None), None)


def _by_rows(value: Any, rows: int, path: tuple[str, ...], left_out: list[str]) -> Any:
    """With a tensor for each list that has an item for each row."""

    def change(item: Any, where: tuple[str, ...]) -> Any:
        return _by_rows(item, rows, where, left_out)

    if type(value) is list and len(value) == rows and path:
        if _numeric(value):
            return _stacked(value, path)
        if any(isinstance(item, (str, bytes)) for item in value):
            left_out.append(".".join(path))
            return _TEXTS
    if isinstance(value, torch.Tensor) or not isinstance(value, (dict, list, tuple)):
        return value
    made = _mapped(value, path, change)
    if isinstance(made, dict):
        return {key: item for key, item in made.items() if item is not _TEXTS}
    if hasattr(made, "_fields"):
        return type(made)(*(None if item is _TEXTS else item for item in made))
    return type(made)(item for item in made if item is not _TEXTS)


def _numeric(value: Any) -> bool:
    """Whether it is a number, or a list of such."""
    if isinstance(value, list):
        return bool(value) and all(map(_numeric, value))
    return isinstance(value, Number) and not isinstance(value, complex)


def _stacked(value: list[Any], path: tuple[str, ...]) -> torch.Tensor:
    try:
        return torch.tensor(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise BatchError(
            f"the batch's {_named(path)} is a list with an item for each row, which makes no "
            f"tensor ({error}): pad the rows to one length"
        ) from error


def _named(path: tuple[str, ...]) -> str:
    return repr(".".join(path) or "batch")
