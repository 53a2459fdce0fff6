"""The code of a function: its hash, and what it names."""

from __future__ import annotations

import dis
import hashlib
import importlib.util
from functools import cache
from types import CodeType
from typing import Any

_IMPORT = dis.opmap["IMPORT_NAME"]


@cache
def hash_of(code: CodeType) -> str:
    """Of what it does and where it stands; not of the text around it."""
    digest = hashlib.sha256(code.co_code)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    told = (code.co_name, names, counts, code.co_firstlineno, code.co_exceptiontable)
    digest.update(repr(told).encode())
    for const in code.co_consts:
        digest.update(_told(const).encode())
    return digest.hexdigest()


def _told(const: Any) -> str:
    if isinstance(const, CodeType):
        return hash_of(const)
    if isinstance(const, frozenset):
        return repr(sorted(map(repr, const)))
    return f"{type(const).__name__} {const!r}"


@cache
def names_in(code: CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All that it names, functions inside it too; and the texts in it that may be names."""
    names = dict.fromkeys(code.co_names)
    texts: dict[str, None] = {}
    for const in code.co_consts:
        for each in const if isinstance(const, tuple) else (const,):
            if isinstance(each, str) and each.isidentifier():
                texts[each] = None
            elif isinstance(each, CodeType):
                inner, more = names_in(each)
                names |= dict.fromkeys(inner)
                texts |= dict.fromkeys(more)
    return tuple(names), tuple(texts)


@cache
def imports_in(code: CodeType, package: str) -> tuple[str, ...]:
    """The modules that it imports when it runs.

    Args:
        package: of the file that it is in.
    """
    found: list[str] = []
    if _IMPORT in code.co_code[::2]:
        before: list[Any] = []
        for step in dis.get_instructions(code):
            if step.opcode == _IMPORT:
                level = next((x for x in before[-2:] if isinstance(x, int)), 0)
                name = "." * level + str(step.argval)
                told = importlib.util.resolve_name(name, package) if level and package else name
                found.append(told)
            before.append(step.argval)
    for const in code.co_consts:
        if isinstance(const, CodeType):
            found += imports_in(const, package)
    return tuple(found)
