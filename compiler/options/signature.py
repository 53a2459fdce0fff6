"""A function's parameters and their documentation, taken from declared options."""

from __future__ import annotations

import difflib
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from ..ir.errors import OptionError
from .declaration import declarations_of

P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")

_INDENT = " " * 4
_WIDTH = 92  # of a docstring's lines, which `help` indents


def takes(arguments: Callable[P, A]) -> Callable[[Callable[[A], R]], Callable[P, R]]:
    """Give a function of an instance of ``arguments`` the parameters of ``arguments``.

    Its docstring gets what is declared of them where it says ``Args:``, which is followed by
    nothing but "...".

    Args:
        arguments: a dataclass of options.
    """
    assert isinstance(arguments, type)
    parameters = inspect.signature(arguments).parameters

    def with_parameters(function: Callable[[A], R]) -> Callable[P, R]:
        @functools.wraps(function, assigned=("__module__", "__name__", "__qualname__"))
        def call(*args: P.args, **given: P.kwargs) -> R:
            _refuse_unknown(signature, args, given)
            try:
                signature.bind(*args, **given)
            except TypeError as error:
                raise TypeError(f"{function.__name__}(): {error}") from None
            return function(arguments(*args, **given))

        returned = inspect.signature(function).return_annotation
        signature = inspect.Signature(
            [parameters[name] for name in declarations_of(arguments)], return_annotation=returned
        )
        shown: Any = call
        shown.__signature__ = signature
        marker = f"Args:\n{_INDENT}..."
        doc = inspect.getdoc(function) or ""
        shown.__doc__ = doc.replace(marker, f"Args:\n{described(arguments)}")
        return call

    return with_parameters


def described(arguments: type) -> str:
    """What is declared of each option, as a docstring lists it."""
    paragraphs = (
        textwrap.fill(
            f"{option.name}: {option.text}",
            _WIDTH,
            initial_indent=_INDENT,
            subsequent_indent=2 * _INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for option in declarations_of(arguments).values()
    )
    return "\n".join(paragraphs)


def _refuse_unknown(
    signature: inspect.Signature, args: tuple[Any, ...], given: Mapping[str, Any]
) -> None:
    """Raises OptionError for names that no parameter has; it also says which one is missing."""
    known = list(signature.parameters)
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    close = [difflib.get_close_matches(name, known, 1) for name in unknown]
    meant = [
        f"{name!r}: did you mean {c[0]!r}?" for name, c in zip(unknown, close, strict=True) if c
    ]
    strange = [repr(name) for name, c in zip(unknown, close, strict=True) if not c]
    if strange:
        meant.append(f"{', '.join(strange)}: known are {', '.join(known)}")
    said = f"unknown option{'s' * (len(unknown) > 1)} {' '.join(meant)}"
    taken = known[: len(args)] + list(given) + [name for c in close for name in c]
    needed = [n for n, p in signature.parameters.items() if p.default is p.empty]
    missing = [repr(name) for name in needed if name not in taken]
    raise OptionError(said + (f"; {', '.join(missing)} is missing" if missing else ""))
