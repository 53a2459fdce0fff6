"""Arrows between rooms run one way; every room is small and says what it is for."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

ROOMS = (
    "compiler/tensors",
    "compiler/host",
    "compiler/calibration",
    "compiler/ir",
    "compiler/compression",
    "compiler/losses",
    "passes/integer",
    "passes/partition",
    "passes/graph",
    "passes/attention",
    "passes/losses",
    "passes/programs",
    "passes/sequencing",
    "passes/generators",
    "passes/schedule",
    "compiler/effects",
    "compiler/rows",
    "compiler/answers",
    "compiler/tracing",
    "compiler/memory",
    "compiler/costs",
    "compiler/regions",
    "compiler/layers",
    "compiler/capture",
    "compiler/general",
    "compiler/plan",
    "compiler/trace",
    "compiler/options",
    "compiler/kept",
    "compiler/profiling",
    "compiler/units",
    "compiler/planning",
    "compiler/driver",
    "compiler/search",
    "compiler/report",
    "compiler/verdict",
    "compiler/page",
    "runtime/kernels",
    "runtime/graphs",
    "runtime/transport",
    "runtime/exchange",
    "runtime/compression",
    "runtime/recording",
    "runtime/files",
    "runtime/weights",
    "runtime/state",
    "runtime/stepping",
    "runtime/data",
    "runtime/checkpoint",
    "runtime/interchange",
    "runtime/verify",
    "runtime/outputs",
    "runtime/monitor",
    "runtime",
    "compiler",
    "runtime/integrations",
    "runtime/elastic",
    "compiler/zoo",
    "compiler/subjects",
    "compiler/cli",
)
"""In the order of the data: a room imports from itself and from those above it."""

FILES = 12  # in a room, at most
LINES = 450  # in a file, at most
BODY = 70  # lines of a function, at most, without its docstring


def sources() -> list[Path]:
    folders = {room.split("/")[0] for room in ROOMS}
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> Iterator[tuple[Path, str]]:
    """The files of ours that a file imports, wherever in it, and the first name taken from each."""
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = path.parents[node.level - 1]
        target = folder.joinpath(*(node.module or "").split("."))
        for alias in node.names:
            found = [target / f"{alias.name}.py", target.with_suffix(".py"), target / "__init__.py"]
            yield next(each for each in found if each.is_file()), alias.name


def wrong_way(rooms: tuple[str, ...]) -> list[str]:
    rank = {room: i for i, room in enumerate(rooms)}
    found = []
    for path in sources():
        here = str(path.parent.relative_to(ROOT))
        for target, name in imported(path):
            there = str(target.parent.relative_to(ROOT))
            if target.parent != ROOT and rank[there] > rank[here]:
                files = f"{path.relative_to(ROOT)} imports {name} from {target.relative_to(ROOT)}"
                found.append(files)
    return found


def test_every_folder_is_a_room() -> None:
    assert {str(path.parent.relative_to(ROOT)) for path in sources()} - set(ROOMS) <= {"passes"}


def test_tests_stand_where_the_rooms_do() -> None:
    """But for those of the whole house, and what tests share."""
    folders = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    assert folders <= {*ROOMS, "passes", ".", "bench", "gpu", "examples"}
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert len(set(names)) == len(names)


def test_arrows_run_one_way() -> None:
    assert not wrong_way(ROOMS), "\n".join(wrong_way(ROOMS))


def test_no_two_files_import_each_other() -> None:
    graph = nx.DiGraph()
    for path in sources():
        graph.add_edges_from((path, target) for target, _ in imported(path))
    circles = [c for c in nx.strongly_connected_components(graph) if len(c) > 1]
    assert not circles, circles


def test_an_arrow_that_runs_back_is_named_with_both_files() -> None:
    swapped = ("compiler", *(room for room in ROOMS if room != "compiler"))
    assert "compiler/api.py imports start from runtime/start.py" in wrong_way(swapped)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_small_and_says_what_it_is_for(room: str) -> None:
    files = [path for path in (ROOT / room).glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= FILES
    text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
    assert text is not None
    assert text.endswith(".")
    assert "\n" not in text


def test_no_file_is_long() -> None:
    tables = [TESTS / "mutants/planted.py"]
    files = {*sources(), *TESTS.rglob("*.py")}.difference(tables)
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert not {path: n for path, n in lengths.items() if n > LINES}


def test_no_function_is_long() -> None:
    long = {}
    for path in sources():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef):
                first = node.body[0]
                skipped = first.end_lineno if ast.get_docstring(node) else node.lineno - 1
                lines = (node.end_lineno or 0) - (skipped or 0)
                long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert not {name: n for name, n in long.items() if n > BODY}


def test_the_package_that_is_installed_has_every_room() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    wanted = {"pipecompile", "pipecompile.passes", "pipecompile.integrations"}
    assert set(listed) == wanted | {f"pipecompile.{room.replace('/', '.')}" for room in ROOMS}
