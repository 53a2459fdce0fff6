"""The list of planted faults is in step with the package and the tests; `make mutants` runs it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from mutants.planted import MUTANTS, Mutant
from mutants.run import ROOT, arguments_of, planted


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.why for mutant in MUTANTS])
def test_every_fault_can_be_planted(mutant: Mutant) -> None:
    path, text = planted(mutant, ROOT)
    compile(text, str(path), "exec")
    assert text != path.read_text()
    file, _, function = arguments_of(mutant.test).partition("::")
    assert f"def {function}" in Path(file).read_text()


def test_every_fault_is_another() -> None:
    assert max(Counter((m.old, m.new) for m in MUTANTS).values()) == 1
