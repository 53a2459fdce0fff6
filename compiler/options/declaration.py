"""How an option is declared: once, with everything that follows from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from inspect import get_annotations
from pathlib import Path
from typing import Any, Literal

from ..ir.errors import OptionError
from ..plan.plan import Plan

_KEY = "option"  # of a dataclass field's metadata
PIPELINE, PLANNER, OUTPUT = "the pipeline", "the planner", "the output"  # groups of flags


@dataclass(frozen=True, kw_only=True)
class Flag:
    """How the command line takes an option.

    Attributes:
        group: the title under which ``--help`` lists it.
        name: None for ``--`` and the option's name.
        parse: its text -> the option's value; raises OptionError.
        default: what ``--help`` gives as the default; None for the option's own.
        more: what only ``--help`` adds.
        repeats: it may be given several times, each time one NAME=STAGE of a mapping.
    """

    group: str
    metavar: str
    name: str | None = None
    parse: Callable[[str], Any] = str
    default: str | None = None
    more: str = ""
    repeats: bool = False


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What is declared of an option.

    Names of options stand in double backticks in its texts; ``--help`` writes their flags instead.

    Attributes:
        help: what it is and what its values do, in ``--help`` and in docstrings; no full stop.
        more: sentences that only docstrings add.
        choices: its values; () for any that pass ``check``.
        check: raises OptionError, given its name and a value; not called with a default of None.
        plan: "keeps": a plan is of one value, and is used with that value only. "decides": a plan
            has decided already, so that it has no effect beside ``plan``.
        in_plan: the text of a value in a plan.
        compared: from its name and the options, what must be equal on all ranks; None where ranks
            may differ, or where something else compares what follows from it.
        flag: None for an option that only Python takes.
        name, default: the field's; MISSING where it has to be given.
    """

    help: str
    more: str = ""
    choices: Collection[object] = ()
    check: Callable[[str, Any], object] | None = None
    plan: Literal["keeps", "decides"] | None = None
    in_plan: Callable[[Any], str] = str
    compared: Callable[[str, Any], object] | None = None
    flag: Flag | None = None
    name: str = ""
    default: Any = None

    @property
    def text(self) -> str:
        """For docstrings: whole sentences."""
        return f"{self.help}. {self.more}".rstrip()

    @property
    def flag_name(self) -> str:
        """As it is typed: ``--tied-grads``."""
        assert self.flag is not None
        return self.flag.name or f"--{self.name.replace('_', '-')}"

    def check_value(self, value: Any) -> None:
        """Raises OptionError for a value that it cannot have, whatever the others are."""
        if value is None and self.default is None:
            return
        if self.choices and value not in list(self.choices):  # a table cannot be asked for a list
            use = " or ".join(map(repr, self.choices))
            raise OptionError(f"{self.name}={value!r}: use {use}")
        if self.check is not None:
            self.check(self.name, value)


def declare(**declared: Any) -> Mapping[str, Declaration]:
    """The metadata of a field that has no default: the attributes of `Declaration`."""
    return {_KEY: Declaration(**declared)}


def option(default: Any, **declared: Any) -> Any:
    """A dataclass field that is an option: its default, and the attributes of `Declaration`."""
    return field(default=default, metadata=declare(**declared))


def declarations_of(declaring: type) -> dict[str, Declaration]:
    """Name -> declaration: positional ones first, then those that the class adds to its bases."""
    own = get_annotations(declaring)
    order = sorted(fields(declaring), key=lambda each: (each.kw_only, each.name not in own))
    return {
        each.name: replace(each.metadata[_KEY], name=each.name, default=each.default)
        for each in order
    }


def as_it_is(name: str, options: Any) -> object:
    """Ranks compare the value itself."""
    return getattr(options, name)


def whether_given(name: str, options: Any) -> str | None:
    """Ranks compare only whether it is None."""
    return None if getattr(options, name) is None else "given"


def decision_of_plan(_: str, options: Any) -> str | None:
    """Ranks compare a hash of what programs follow from: stages and recomputation."""
    given: str | Path | Plan | None = options.plan
    if given is None:
        return None
    made = (given if isinstance(given, Plan) else Plan.load(given)).decision
    parts = (made.fingerprint, made.unit_nodes, made.unit_stage, made.recomputed)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
