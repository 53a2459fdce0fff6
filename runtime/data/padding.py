"""Sequences that are padded to a few lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...compiler.ir.errors import BatchError, OptionError

Collate = Callable[[Any], Any]

PADDING: Mapping[str, Any] = {
    "input_ids": 0,
    "attention_mask": 0,
    "token_type_ids": 0,
    "position_ids": 0,
    "labels": -100,
}
"""What transformers' models take for padding, by the keys of a batch."""


def pad_to_multiple(
    collate: Collate,
    multiple: int,
    *,
    values: Mapping[str, Any] = PADDING,
    dim: int = 1,
    mask: str | None = "attention_mask",
) -> Collate:
    """A collate function whose batches have a few lengths only: what another one makes, padded.

    Args:
        collate: makes a dict of tensors.
        multiple: what lengths are padded to multiples of.
        values: key -> what is put at the end of its tensor, along ``dim``. Tensors under other
            keys, and those without such a dimension, stay as they are if they are not as long.
        dim: of the sequence.
        mask: key of a mask that is 0 for padding and 1 for what was there, which is made where the
            batch has none, so that no model takes padding for a part of the sequence. None for
            models that do not look ahead, and whose labels leave padding out.

    Raises:
        OptionError: ``multiple`` is less than 1.
        BatchError: when it collates: nothing of the batch is in ``values``, or a tensor as long as
            the sequence is not.
    """
    if type(multiple) is not int or multiple < 1:
        raise OptionError(f"pad_to_multiple: multiple={multiple!r}: give 1 or more")

    def padded(samples: Any) -> dict[str, Any]:
        batch = dict(collate(samples))
        long = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and v.dim() > dim}
        lengths = {tensor.shape[dim] for key, tensor in long.items() if key in values}
        if len(lengths) != 1:
            raise BatchError(
                f"pad_to_multiple: of the batch's {', '.join(map(repr, long)) or 'nothing'}, those "
                f"in values= ({', '.join(map(repr, values))}) are to have one length: they have "
                f"{sorted(lengths) or 'none'}"
            )
        (length,) = lengths
        if mask is not None and mask not in batch:
            like = next(tensor for key, tensor in long.items() if key in values)
            shape = like.shape[: dim + 1]
            batch[mask] = long[mask] = torch.ones(shape, dtype=torch.int64, device=like.device)
        for key, tensor in long.items():
            if key not in values and key != mask:
                if tensor.shape[dim] == length:
                    raise BatchError(
                        f"pad_to_multiple: {key!r} is as long as the sequence: say in values= what "
                        "to pad it with"
                    )
                continue
            batch[key] = _longer(tensor, dim, -length % multiple, values.get(key, 0))
        return batch

    return padded


def _longer(tensor: torch.Tensor, dim: int, more: int, value: Any) -> torch.Tensor:
    shape = (*tensor.shape[:dim], more, *tensor.shape[dim + 1 :])
    return torch.cat([tensor, tensor.new_full(shape, value)], dim)
