"""examples/tune.py, short: trials share what was compiled, and the study goes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.example import said


@pytest.mark.slow
def test_a_study_goes_on_and_its_best_trial_is_that_of_one_device(tmp_path: Path) -> None:
    given = ("tune.py", "--steps", "6", "--study", str(tmp_path / "study.db"))
    first = said(*given, "--trials", "3")
    assert re.search(r"trials: 0 before, 3 now, \d pruned", first)
    second = said(*given, "--trials", "3")
    assert re.search(r"trials: 3 before, 3 now, [1-9] pruned", second)
    for text in (first, second):
        assert "compiled once: True" in text
        assert "again: the same loss" in text
        assert "the best trial: the bits of one device, 21 tensors" in text
