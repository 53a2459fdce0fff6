"""What one option's value must be, whatever the others are: each raises OptionError."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from numbers import Real
from typing import Any

from ..ir.errors import OptionError
from ..ir.zero import LEVELS

ZERO = tuple(zero.level for zero in LEVELS)
MOST = 1 << 16
"""Stages, replicas, microbatches, or ranks. More are a slip, and would fill the memory."""


def check_count(name: str, value: Any) -> None:
    check_int(name, value)
    if value < 1:
        raise OptionError(f"{name}={value} must be at least 1")
    if value > MOST:
        raise OptionError(f"{name}={value} must be at most {MOST}")


def check_natural(name: str, value: Any) -> None:
    check_int(name, value)
    if value < 0:
        raise OptionError(f"{name}={value} must be at least 0")


def check_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise OptionError(f"{name}={value!r} must be an int")


def check_truth(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r} must be True or False")


def check_above_zero(name: str, value: Any) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise OptionError(f"{name}={value!r} must be a number")
    if not float(value) > 0:
        raise OptionError(f"{name}={value} must be above 0")


def callable_or(advice: str) -> Callable[[str, Any], None]:
    """A check that gives advice where a value is not callable."""

    def check(name: str, value: Any) -> None:
        if not callable(value):
            raise OptionError(f"{name}={value!r} is not callable: {advice}")

    return check


def check_optimizer(name: str, value: Any) -> None:
    """A factory, and not what it makes."""
    if hasattr(value, "param_groups"):
        kind, rate = type(value).__name__, getattr(value, "defaults", {}).get("lr", 3e-4)
        raise OptionError(
            f"{name}= was given an optimizer, {kind}, which has parameters of your model, and the "
            f"pipeline trains its own copies of them: give what makes one, such as "
            f"functools.partial({kind}, lr={rate}), or a function of the named parameters"
        )
    callable_or("give a factory such as functools.partial(torch.optim.AdamW, lr=3e-4)")(name, value)


def check_scheduler(name: str, value: Any) -> None:
    """A factory, and not what it makes."""
    if callable(getattr(value, "step", None)) and not isinstance(value, type):
        kind = type(value).__name__
        raise OptionError(
            f"{name}= was given a scheduler, {kind}, which has an optimizer that the pipeline does "
            f"not step: give what makes one of the pipeline's optimizer, such as "
            f"functools.partial({kind}, ...) without the optimizer"
        )
    callable_or("give a function that takes the optimizer and returns its scheduler")(name, value)


def one_of(kinds: tuple[type, ...], advice: str) -> Callable[[str, Any], None]:
    """A check that gives advice where a value is of no such kind."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, kinds):
            raise OptionError(f"{name}={value!r}: {advice}")

    return check


def check_level(name: str, value: Any) -> None:
    known = value == "auto" if isinstance(value, str) else type(value) is int and value in ZERO
    if not known:
        raise OptionError(f'{name}={value!r}: use 0, 1, 2, 3 or "auto"')


def check_graphs(name: str, value: Any) -> None:
    if not isinstance(value, bool) and not (isinstance(value, str) and value == "auto"):
        raise OptionError(f'{name}={value!r}: use True, False or "auto"')


def check_chunks(name: str, value: Any) -> None:
    """Of how many tokens logits exist at once."""
    known = value in ("auto", "off") if isinstance(value, str) else type(value) is int and value > 0
    if not known:
        raise OptionError(
            f'{name}={value!r}: use "off", "auto", or a number of tokens above 0, such as 512'
        )


def check_stages(name: str, value: Any) -> None:
    """Of modules: name -> stage."""
    if not isinstance(value, Mapping):
        raise OptionError(f'{name}={value!r}: give a dict such as {{"lm_head": 1}}')
    for module, stage in value.items():
        if not isinstance(module, str):
            raise OptionError(f"{name}={{{module!r}: {stage!r}}}: give the dotted name of a module")
        if not isinstance(stage, int) or isinstance(stage, bool):
            raise OptionError(f"{name}={{{module!r}: {stage!r}}}: a stage is an int")


def check_names(name: str, value: Any) -> None:
    if isinstance(value, str) or not isinstance(value, Collection):
        raise OptionError(f"{name}={value!r}: give a list of names")


HOOKS = ("on_start", "on_step", "on_evaluate", "on_save")
"""What callbacks may have; `runtime.monitor.callbacks` says when each is called."""


def check_callbacks(name: str, value: Any) -> None:
    if isinstance(value, str) or not isinstance(value, Collection):
        raise OptionError(f'{name}={value!r}: give a list, such as [callbacks.CSV("run.csv")]')
    for each in value:
        if isinstance(each, type):
            raise OptionError(f"{name}=[{each.__name__}]: give an object, {each.__name__}(...)")
        if not any(callable(getattr(each, hook, None)) for hook in HOOKS):
            raise OptionError(
                f"{name}=[{each!r}]: it has none of {', '.join(HOOKS)}: derive it from "
                "pipecompile.callbacks.Callback"
            )


def check_precision(_: str, given: Any) -> None:
    from ..ir.precision import parse_precision  # imports torch

    parse_precision(given)


def check_dynamic(name: str, given: Any) -> None:
    from . import ranges  # imports torch

    ranges.check_dynamic(name, given)
