"""What does a step of the user's optimizer depend on? Found out by stepping stand-ins.

==========  ========================================  =====================================
reach       the step of an element depends on         such as
==========  ========================================  =====================================
`ELEMENT`   that element alone                        SGD, Adam, Lion
`TENSOR`    its own parameter                         Adafactor, Muon, Shampoo, LAMB
`MODEL`     other parameters too                      Prodigy, D-Adaptation, L-BFGS
==========  ========================================  =====================================

Replicas may step rows of a parameter where it is `ELEMENT`, and whole ones where it is `TENSOR`;
with `MODEL` one optimizer must have all of them. No list of names is kept, so that it holds for
optimizers that nobody here has heard of.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from torch import nn

from ..ir.errors import OptionError
from ..memory.meter import StorageMeter
from ..memory.optimizer_cost import answering
from ..tensors.fakes import weightless
from .standins import Factory, Shape, StandIns, Tensors, called, gradients, stand_ins, values

STEPS = 8
_RATE = 0.1  # so that something moves, whatever the rate is
_EXACT = 1e-4  # of the largest update: kernels may round differently at the ends of a vector
_ROUGH = 0.05  # one that stacks matrices of one shape, in bf16, gets other bits for other stacks


class Reach(IntEnum):
    """How far a step looks."""

    ELEMENT = 0
    TENSOR = 1
    MODEL = 2


@dataclass(frozen=True)
class Verdict:
    """An optimizer's class, how far its steps look, and what showed it."""

    kind: str
    reach: Reach
    why: str = ""


_known: dict[Any, Verdict] = {}


def try_optimizer(
    factory: Factory, params: Mapping[str, torch.Tensor], device: torch.device, rows: bool
) -> Verdict:
    """Step stand-ins in several ways that must come out alike; once for what is an optimizer's
    class and plain settings.

    Args:
        params: FQN -> a trained parameter, of which only shape and dtype matter.
        device: where to try.
        rows: tell `ELEMENT` from `TENSOR`; otherwise the verdict is at least `TENSOR`.

    Raises:
        OptionError: there is no optimizer, or it fails.
    """
    settings = _plain(factory)
    if settings is None:
        return _tried(factory, params, device, rows)
    shapes = tuple((name, tuple(param.shape), param.dtype) for name, param in params.items())
    key = settings, shapes, device, rows
    if key not in _known:
        _known[key] = _tried(factory, params, device, rows)
    return _known[key]


def _plain(factory: Factory) -> Any:
    """What a factory does, as data; None where only calling it tells."""
    made = factory if isinstance(factory, partial) else partial(factory)
    settings = made.args, tuple(sorted(made.keywords.items()))
    return (made.func, settings) if isinstance(made.func, type) and _is_plain(settings) else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _tried(
    factory: Factory, params: Mapping[str, torch.Tensor], device: torch.device, rows: bool
) -> Verdict:
    views = {name: _view(param, device) for name, param in params.items()}
    optimizer = called(factory, list(views.items()))
    chosen = stand_ins(optimizer, views)
    kind = type(optimizer).__name__
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        trial = _trial(factory, chosen, device, kind)
        why = trial.looks_beyond()
        if why:
            return Verdict(kind, Reach.MODEL, why)
        if not rows:
            return Verdict(kind, Reach.TENSOR)
        why = trial.needs_whole() or _chooses_by_size(factory, chosen, params, device)
    return Verdict(kind, Reach.TENSOR if why else Reach.ELEMENT, why)


def _view(param: torch.Tensor, device: torch.device) -> nn.Parameter:
    """A parameter of this shape and dtype in the memory of one element."""
    one = torch.zeros((), dtype=param.dtype, device=device)
    return nn.Parameter(one.expand(param.shape))


@dataclass(frozen=True)
class _Outcome:
    """How far the parameters have moved, the optimizer's states of them, and their group's
    settings."""

    moves: Tensors
    states: dict[str, dict[str, Any]]
    settings: dict[str, dict[str, Any]]


class _Trial:
    """One optimizer's steps on the stand-ins."""

    def __init__(
        self, factory: Factory, chosen: StandIns, device: torch.device, dtype: torch.dtype
    ):
        self._factory, self._chosen = factory, chosen
        self._start = values(chosen.shapes, device, dtype)
        self._grads = gradients(self._start, STEPS)
        self._together = self._stepped(self._start, self._grads)

    def looks_beyond(self) -> str:
        """Where the step of a parameter depends on others; "" if it does not."""
        together = self._together
        if not any(bool(move.count_nonzero()) for move in together.moves.values()):
            return f"it moves no parameter in {STEPS} steps, so that nothing can be seen"
        others = gradients(self._start, STEPS, other=True)
        halves = self._chosen.first, self._chosen.second
        for kept, changed in (halves, halves[::-1]):
            if not kept or not changed:
                continue
            mixed = [
                own | {name: other[name] for name in changed}
                for own, other in zip(self._grads, others, strict=True)
            ]
            found = self._stepped(self._start, mixed)
            for name in kept:
                if not _alike(found, together, name):
                    return f"the step of {name!r} depends on the gradients of other parameters"
            for name, move in self._alone(kept).items():
                if not _near(move, together.moves[name], _ROUGH):
                    return f"the step of {name!r} depends on which other parameters there are"
        return ""

    def needs_whole(self) -> str:
        """The parameter of which rows cannot be stepped alone; "" if there is none."""
        half = {name: max(1, len(t) // 2) for name, t in self._start.items() if t.dim()}

        def cut(tensors: Tensors) -> Tensors:
            return {name: t[: half[name]] if name in half else t for name, t in tensors.items()}

        try:
            rows = self._stepped(cut(self._start), [cut(step) for step in self._grads])
        except Exception as error:
            return f"it fails on rows of parameters ({type(error).__name__}: {error})"
        whole = self._together
        for name, move in cut(whole.moves).items():
            if not _near(rows.moves[name], move, _EXACT):
                return f"rows of {name!r} move otherwise alone"
            shape = self._start[name].shape
            if not _rows_of_states(rows.states[name], whole.states[name], shape, half.get(name)):
                return f"its states of {name!r} are not of single elements"
        return ""

    def _alone(self, names: Sequence[str]) -> Tensors:
        """The same steps by an optimizer that has some of the parameters, as on a stage; none
        where its factory wants all of them, for a stage that lacks some fails itself."""
        start = {name: self._start[name] for name in names}
        try:
            return self._stepped(start, self._grads).moves
        except Exception:
            return {}

    def _stepped(self, start: Tensors, grads: Sequence[Tensors]) -> _Outcome:
        torch.manual_seed(0)
        params = {name: nn.Parameter(t.clone()) for name, t in start.items()}
        optimizer = self._factory(list(params.items()))
        for group in optimizer.param_groups:
            rate = group.get("lr")
            if isinstance(rate, torch.Tensor):
                group["lr"] = torch.full_like(rate, _RATE)
            elif isinstance(rate, float):
                group["lr"] = _RATE
        if callable(train := getattr(optimizer, "train", None)):
            train()
        step_once = _stepping(optimizer)
        for step in grads:
            for name, param in params.items():
                param.grad = step[name].clone()
            step_once()
        group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        return _Outcome(
            {name: param.detach() - start[name] for name, param in params.items()},
            {name: dict(optimizer.state.get(param, {})) for name, param in params.items()},
            {name: group_of.get(param, {}) for name, param in params.items()},
        )


def _trial(factory: Factory, chosen: StandIns, device: torch.device, kind: str) -> _Trial:
    """In fp64, in which differences are no rounding, or fp32 for optimizers that know only that."""
    try:
        return _Trial(factory, chosen, device, torch.float64)
    except Exception:
        try:
            return _Trial(factory, chosen, device, torch.float32)
        except Exception as error:
            raise OptionError(
                f"{kind} failed when it was tried on small parameters ({type(error).__name__}: "
                f"{error}), so that nobody knows whether its steps can be divided: use n_stages=1 "
                "and zero=0 with it, or make it yourself from pipe.parameters()"
            ) from error


def _stepping(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """Its step, with a closure where it must have one."""
    wanted = [
        each
        for each in inspect.signature(optimizer.step).parameters.values()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    if not wanted:
        return optimizer.step
    return lambda: optimizer.step(lambda: 0.0)


# -- alike ----------------------------------------------------------------------------------------


def _near(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether they differ by little of what is largest in them."""
    if a.shape != b.shape:
        return False
    if not a.numel():
        return True
    most = max(float(a.abs().max()), float(b.abs().max()))
    return float((a - b).abs().max()) <= tolerance * most  # False for NaN


def _alike(a: _Outcome, b: _Outcome, name: str) -> bool:
    return _near(a.moves[name], b.moves[name], _EXACT) and all(
        mine.keys() == theirs.keys() and all(_same(mine[k], theirs[k]) for k in mine)
        for mine, theirs in (
            (a.states[name], b.states[name]),
            (_settings(a.settings[name]), _settings(b.settings[name])),
        )
    )


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _same(a: Any, b: Any) -> bool:
    """Numbers and tensors of them; what else there is does not count."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    numbers = (int, float, torch.Tensor)
    if isinstance(a, numbers) and isinstance(b, numbers):
        return _near(torch.as_tensor(a).double(), torch.as_tensor(b).double(), _EXACT)
    return True


def _rows_of_states(
    rows: Mapping[str, Any], whole: Mapping[str, Any], shape: Shape, count: int | None
) -> bool:
    """Whether the states of the first rows are those rows of the whole parameter's states."""
    if rows.keys() != whole.keys():
        return False
    for key, state in whole.items():
        mine = rows[key]
        if isinstance(state, torch.Tensor) and state.numel() > 1:
            if state.shape != shape or not isinstance(mine, torch.Tensor):
                return False
            if not _same(mine, state if count is None else state[:count]):
                return False
        elif not _same(mine, state):
            return False
    return True


# -- sizes ----------------------------------------------------------------------------------------


def _chooses_by_size(
    factory: Factory,
    chosen: StandIns,
    params: Mapping[str, torch.Tensor],
    device: torch.device,
) -> str:
    """Why the stand-ins may not speak for larger parameters: other operators run on these."""
    if not chosen.cut:
        return ""
    names = dict.fromkeys((*chosen.first, *chosen.second))
    small = {n: (chosen.shapes[n], params[n].dtype) for n in names}
    large = {n: (tuple(params[n].shape), params[n].dtype) for n in names}
    try:
        if _operators(factory, small, device) == _operators(factory, large, device):
            return ""
    except Exception as error:
        return f"its steps cannot be followed on large parameters ({type(error).__name__})"
    return "it steps large parameters with other operators than small ones"


def _operators(
    factory: Factory, like: Mapping[str, tuple[Shape, torch.dtype]], device: torch.device
) -> list[Any]:
    """What two steps call on parameters without data."""
    seen: list[Any] = []

    def noted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append(func)
        return answering(func, args, kwargs)

    with weightless():
        params = {
            name: nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
            for name, (shape, dtype) in like.items()
        }
        for param in params.values():
            param.grad = torch.zeros_like(param)
        with StorageMeter(noted):
            optimizer = factory(list(params.items()))
            if callable(train := getattr(optimizer, "train", None)):
                train()
            step_once = _stepping(optimizer)
            step_once()
            step_once()
    return seen
