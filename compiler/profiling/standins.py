"""Small parameters that stand for a model's own, and their gradients, to try optimizers on.

Optimizers choose by name, by group and by shape: vectors apart from matrices, matrices from 16×16
or 128×128 on. So there is a stand-in for each shape in each kind of parameter group, under the
name of a parameter that has it, no smaller than such thresholds where the parameter is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..ir.errors import OptionError

Factory = Callable[[Iterable[Any]], torch.optim.Optimizer]
Shape = tuple[int, ...]
Tensors = dict[str, torch.Tensor]

_LARGE = 129  # above the usual thresholds; larger dimensions become this, or a little more
_LARGEST = 132
_ELEMENTS = 1 << 15  # of one stand-in, about
_KINDS = 24  # of stand-ins, at most
# How much of a gradient is the same in every step: optimizers that estimate a step size go by that.
_STEADY = (1.0, 0.0, 0.6, 0.2)
_SCALES = (1.0, 0.01, 30.0)


@dataclass(frozen=True)
class StandIns:
    """Name -> the shape that it is tried in.

    Attributes:
        first, second: half of them each, with one of each kind that has two.
        cut: whether a parameter is larger than its stand-in.
    """

    shapes: Mapping[str, Shape]
    first: tuple[str, ...]
    second: tuple[str, ...]
    cut: bool


def called(factory: Factory, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """The optimizer that a factory makes of named parameters.

    Raises:
        OptionError: it makes none, or groups that torch refuses in its own words.
    """
    try:
        optimizer = factory(named)
    except ValueError as error:
        if "with/without names" in str(error):
            raise OptionError(
                "optimizer= made a parameter group of (name, parameter) pairs that is empty, as it "
                "may be on a stage, and torch refuses it: put the parameters alone into the groups"
            ) from error
        raise
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(
            f"optimizer= returned a {type(optimizer).__name__}: give a factory that takes named "
            "parameters and returns a torch.optim.Optimizer"
        )
    return optimizer


def or_nothing(named: Sequence[tuple[str, nn.Parameter]]) -> Sequence[tuple[str, nn.Parameter]]:
    """These, or where there are none an empty one: schedulers and loops work on a process that
    trains nothing (a stage whose parameters are all frozen) too."""
    return named or [("nothing_to_train_here", nn.Parameter(torch.empty(0)))]


def stand_ins(optimizer: torch.optim.Optimizer, params: Mapping[str, nn.Parameter]) -> StandIns:
    """One or two for each kind of parameter that an optimizer has.

    Args:
        optimizer: over these parameters, of which no data is read.
    """
    small = _shrinking(tuple(param.shape) for param in params.values())
    group_of = {id(p): _kind(group) for group in optimizer.param_groups for p in group["params"]}
    kinds: dict[Any, list[str]] = {}
    for name, param in params.items():
        if id(param) in group_of:
            key = small[tuple(param.shape)], group_of[id(param)]
            kinds.setdefault(key, []).append(name)
    chosen = list(kinds.items())[:: -(-len(kinds) // _KINDS) or 1]
    halves: tuple[list[str], list[str]] = ([], [])
    singles = 0
    for _, names in chosen:
        if len(names) > 1:
            halves[0].append(names[0])
            halves[1].append(names[-1])
        else:
            halves[singles % 2].append(names[0])
            singles += 1
    shapes = {name: shape for (shape, _), names in chosen for name in {names[0], names[-1]}}
    ordered = {name: shapes[name] for name in params if name in shapes}
    cut = any(shape != tuple(params[name].shape) for name, shape in ordered.items())
    return StandIns(ordered, tuple(halves[0]), tuple(halves[1]), cut)


def _kind(settings: Any) -> Any:
    """What of a group's settings chooses between ways to step: no numbers, such as a layer's
    learning rate, and no parameters."""
    if isinstance(settings, dict):
        rest = {k: v for k, v in settings.items() if k not in ("params", "param_names")}
        return tuple((key, _kind(value)) for key, value in sorted(rest.items()))
    if isinstance(settings, (tuple, list)):
        return tuple(map(_kind, settings))
    return settings if isinstance(settings, (bool, str)) else type(settings).__name__


def _shrinking(shapes: Iterable[Shape]) -> dict[Shape, Shape]:
    """Shape -> that of its stand-in: what is large stays large, and what is larger larger."""
    distinct = set(shapes)
    large = sorted({n for shape in distinct for n in shape if n > _LARGE})
    size = {n: min(_LARGE + i, _LARGEST) for i, n in enumerate(large)}
    return {shape: _bounded([size.get(n, n) for n in shape]) for shape in distinct}


def _bounded(shape: list[int]) -> Shape:
    while torch.Size(shape).numel() > _ELEMENTS and max(shape) > 17:
        largest = shape.index(max(shape))
        shape[largest] = max(17, shape[largest] // 2)
    return tuple(shape)


def values(shapes: Mapping[str, Shape], device: torch.device, dtype: torch.dtype) -> Tensors:
    """What the stand-ins are before they are stepped."""
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=draw, dtype=dtype).to(device)
        for name, shape in shapes.items()
    }


def gradients(start: Tensors, steps: int, other: bool = False) -> list[Tensors]:
    """Per step a gradient of each: of different scales, signs, and constancy from step to step.

    Args:
        other: others, in all of these.
    """
    draw = torch.Generator().manual_seed(2 if other else 1)
    made: list[Tensors] = [{} for _ in range(steps)]
    for i, (name, value) in enumerate(start.items()):
        steady = _STEADY[(i + other) % len(_STEADY)]
        scale = _SCALES[i % len(_SCALES)] * (-7.0 if other else 1.0)

        def drawn(value: torch.Tensor = value) -> torch.Tensor:
            made = torch.randn(value.shape, generator=draw, dtype=value.dtype)
            return made.to(value.device)

        always = drawn()
        for step in made:
            step[name] = (always * steady + drawn() * (1 - steady)) * scale
    return made
