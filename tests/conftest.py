"""Fixtures: one thread per process, gangs of processes that are started once, drawn examples.

Torch is imported where it is used: xdist starts its workers when this file has been read.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
from hypothesis import Phase, settings
from support.folder import FOLDER
from support.gang import Gang
from support.groups import Groups, tell

logging.getLogger("transformers").setLevel(logging.ERROR)
os.environ.setdefault("PIPECOMPILE_COSTS", "roofline")  # measuring takes a second per compile
os.environ["PIPECOMPILE_CACHE"] = "off"  # no test finds what another one has left

if FOLDER not in os.environ:  # workers of xdist have it, and gangs
    _remembered = tempfile.TemporaryDirectory(prefix="remembered-")
    os.environ[FOLDER] = _remembered.name

# A busy machine is no failure. CI draws the same examples every time: chance blames no change.
settings.register_profile("pipecompile", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("pipecompile")
settings.register_profile(  # of `make mutants`, which asks only whether a test fails
    "mutants", derandomize=True, phases=(Phase.explicit, Phase.generate)
)


def pytest_collection_finish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # of xdist
        tell(i.nodeid for i in session.items if "gang" in getattr(i, "fixturenames", ()))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadgroup` one worker starts all gangs, and each once."""
    return Groups(config, log) if config.getvalue("dist") == "loadgroup" else None


@pytest.fixture(scope="session", autouse=True)
def _set_up() -> Iterator[None]:
    from support.process import settle
    from support.remembered import remembering

    settle()
    with remembering():
        yield


@pytest.fixture(scope="session")
def gang() -> Iterator[Callable[[int], Gang]]:
    """A function from a number of processes to a gang of that size."""
    gangs: dict[int, Gang] = {}

    def of_size(size: int) -> Gang:
        if size not in gangs:
            gangs[size] = Gang(size)
        return gangs[size]

    yield of_size
    for each in gangs.values():
        each.close()


@pytest.fixture
def traces() -> Iterator[list[bool]]:
    """Of every trace, whether it had symbols."""
    import torch

    found, export = [], torch.export.export

    def exported(*args: Any, **options: Any) -> Any:
        found.append(options.get("dynamic_shapes") is not None)
        return export(*args, **options)

    with mock.patch.object(torch.export, "export", exported):
        yield found


@pytest.fixture
def told() -> Iterator[Callable[[], list[str]]]:
    """What was said of numbers of the batch so far, at the third value instead of the fifth."""
    with (
        warnings.catch_warnings(record=True) as caught,
        mock.patch("pipecompile.runtime.data.numbers.VALUES", 2),
    ):
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in caught if "number that changes" in str(w.message)]
