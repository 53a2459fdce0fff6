"""What the pipeline has trained, into a plain model of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...compiler.ir.errors import StateError
from ...compiler.tensors.facts import short_name
from ...compiler.tensors.fakes import is_fake
from .model_state import ModelState
from .state_dict import Piece, kind_of, wanted_of


class Filled:
    """A model that takes a state dict, one piece at a time.

    All that may not fit is found out before the first.

    Raises:
        StateError: names, shapes, kinds of dtypes or ties differ, or there is no memory to copy to.
    """

    def __init__(self, state: ModelState, model: nn.Module):
        if not isinstance(model, nn.Module):
            raise StateError(
                f"load_into() was given a {type(model).__name__}: give a model, or None"
            )
        wanted, canonical = wanted_of(state, of_loss=False), state.skeleton.canonical
        self._model = model
        self._held: dict[str, Any] = dict(model.state_dict(keep_vars=True))
        _check_names(type(model).__name__, self._held, wanted)
        tensors = {name: self._held[name] for name in wanted if name in canonical}
        for name, tensor in tensors.items():
            _check(name, tensor, wanted[name])
        _check_ties(tensors, canonical)

    @torch.no_grad()
    def take(self, piece: Piece, value: Any) -> None:
        """One of the pieces, in the dtype and on the device that the model has it."""
        if not piece.first:
            self._model.load_state_dict({piece.names[0]: value}, strict=False)
            return
        for name in piece.names:
            self._held[name].copy_(value)


def _check_names(model: str, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    missing = [name for name in wanted if name not in held]
    unexpected = [name for name in held if name not in wanted]
    if missing or unexpected:
        raise StateError(
            f"load_into() was given a {model} of other names than the model that was compiled: "
            f"missing {missing[:5]}, unexpected {unexpected[:5]}"
        )


def _check(name: str, tensor: Any, like: torch.Tensor) -> None:
    """Raises StateError where a tensor cannot take the values of one like another."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        raise StateError(
            f"{name!r} is a {type(tensor).__name__} in the model, which cannot be copied to: give "
            "load_into() a model with plain tensors, and convert it afterwards"
        )
    if is_fake(tensor):
        raise StateError(
            f"{name!r} is on the meta device: build the model with data, or call "
            'model.to_empty(device="cpu") before load_into() and make what no state dict has'
        )
    if tensor.is_inference():
        raise StateError(
            f"{name!r} was made under torch.inference_mode, and cannot be written to outside of it"
        )
    if tuple(tensor.shape) != tuple(like.shape):
        raise StateError(
            f"{name!r} has shape {list(tensor.shape)} in the model and {list(like.shape)} in the "
            "pipeline"
        )
    if kind_of(tensor.dtype) != kind_of(like.dtype):
        raise StateError(
            f"{name!r} is {short_name(tensor.dtype)} in the model and {short_name(like.dtype)} in "
            "the pipeline: convert it first"
        )


def _check_ties(tensors: Mapping[str, torch.Tensor], canonical: Mapping[str, str]) -> None:
    """Raises StateError where the model ties what the pipeline does not."""
    first_of: dict[int, str] = {}
    for name, tensor in tensors.items():
        first = first_of.setdefault(id(tensor), name)
        if canonical[first] != canonical[name]:
            raise StateError(
                f"{first!r} and {name!r} are one tensor in the model and two in the pipeline: give "
                "load_into() a model that ties what the compiled one did"
            )
