"""What the Makefile runs as a script finds what it imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(set(re.findall(r"python (tests/bench/\w+\.py)", (ROOT / "Makefile").read_text())))
HELPERS = "sys.path.insert(0, str(Path(__file__).parents[1]))"


def imports_helpers(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("support")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_adds_the_tests_folder_before_it_imports_from_there(script: str) -> None:
    """A script's own folder is on the path, and not that of the tests; pytest adds it by itself."""
    body = ast.parse((ROOT / script).read_text()).body
    first = next((n for n, each in enumerate(body) if imports_helpers(each)), len(body))
    added = any(ast.unparse(each) == HELPERS for each in body[:first])
    assert added or first == len(body)


def test_scripts_are_found() -> None:
    assert len(SCRIPTS) > 8
