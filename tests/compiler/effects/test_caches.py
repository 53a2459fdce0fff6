"""Functions that keep results are found wherever they are, also where it was looked before."""

from __future__ import annotations

import fnmatch
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pipecompile.compiler.effects.caches import caches

SOURCE = """
import functools

plain = 0

class Kind:
    def method(self): ...

@functools.lru_cache
def kept(): ...
"""


@pytest.fixture(params=["site-packages", "work"])
def module(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModuleType]:
    """Of an installed library, or the user's."""
    path = tmp_path / request.param / "made_for_caches.py"
    path.parent.mkdir()
    path.write_text(SOURCE)
    yield _imported(path)
    del sys.modules["made_for_caches"]


def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("made_for_caches", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["made_for_caches"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keeping() -> Callable[..., Any]:
    return functools.lru_cache(lambda: None)


def found(function: object) -> bool:
    return any(each is function for each in caches())


def test_what_comes_later_is_found_too(module: ModuleType) -> None:
    assert found(module.kept)
    assert found(module.kept)
    module.more = keeping()
    assert found(module.more)
    module.plain = keeping()  # in the place of something else
    assert found(module.plain)
    module.Kind.more = keeping()
    assert found(module.Kind.more)
    before, module.kept = module.kept, None
    assert not found(before)


def test_a_module_that_is_imported_again_is_another(module: ModuleType) -> None:
    assert found(module.kept)
    assert module.__file__ is not None
    again = _imported(Path(module.__file__))
    assert found(again.kept)
    assert not found(module.kept)


def test_what_is_imported_from_torch_or_python_is_theirs(module: ModuleType) -> None:
    module.translate = fnmatch._compile_pattern
    assert isinstance(module.translate, functools._lru_cache_wrapper)
    assert not found(module.translate)
    assert found(module.kept)


def test_those_of_torch_and_python_are_theirs() -> None:
    names = {getattr(function, "__module__", "").split(".")[0] for function in caches()}
    assert names
    assert not {"torch", "functools", "re", "typing"} & names
