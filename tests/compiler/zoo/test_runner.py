"""Trials in processes: outcomes are kept, time is limited, nothing is done twice."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from pipecompile.compiler.cli.main import main
from pipecompile.compiler.zoo import runner
from pipecompile.compiler.zoo.coverage import markdown, summary
from pipecompile.compiler.zoo.families import Architecture
from pipecompile.compiler.zoo.trial import Outcome
from support.trials import quick


def wanted(*names: str) -> list[Architecture]:
    return [Architecture("causal-lm", name) for name in names]


@pytest.mark.slow
def test_each_has_an_outcome_in_the_file(tmp_path: Path) -> None:
    names = ("a", "slow", "dies", "b")
    found = list(runner.run(wanted(*names), tmp_path, 3, limit_s=2, jobs=4, trial=quick))
    kept = runner.read(tmp_path)
    assert sorted(kept.values(), key=str) == sorted(found, key=str)
    assert [kept[each].outcome for each in wanted(*names)] == [
        "right",
        "timeout",
        "failed",
        "right",
    ]
    assert kept[wanted("a")[0]].parameters == 3
    assert kept[wanted("dies")[0]].reason == "its process ended with 3"


def test_the_last_outcome_counts_and_half_a_line_does_not(tmp_path: Path) -> None:
    lines = [
        '{"family": "causal-lm", "name": "a", "outcome": "failed"}',
        '{"family": "causal-lm", "name": "a", "outcome": "right"}',
        '{"family": "causal-lm", "name": "b", "outc',
    ]
    (tmp_path / runner.FILE).write_text("\n".join(lines))
    assert [each.outcome for each in runner.read(tmp_path).values()] == ["right"]


def test_zoo_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[str] = []

    def fake(wanted: list[Architecture], directory: Path, *_: Any) -> Any:
        for each in wanted:
            tried.append(each.name)
            outcome = "refused" if each.name == "gpt2" else "right"
            line = f'{{"family": "{each.family}", "name": "{each.name}", "outcome": "{outcome}"}}\n'
            directory.mkdir(exist_ok=True)
            with (directory / runner.FILE).open("a") as file:
                file.write(line)
            yield runner.read(directory)[each]

    monkeypatch.setattr(runner, "run", fake)
    docs = tmp_path / "coverage.md"
    zoo = ["zoo", "--out", str(tmp_path / "out"), "--family", "causal-lm", "--docs", str(docs)]
    assert main([*zoo, "--only", "gpt2"]) == 0
    assert main([*zoo, "--only", "gpt2", "llama"]) == 0
    assert tried == ["gpt2", "llama"]
    assert main([*zoo, "--only", "gpt2", "--again"]) == 0
    assert tried == ["gpt2", "llama", "gpt2"]
    assert "| causal-lm | 0 | 1 |" in capsys.readouterr().out
    assert "- `causal-lm/gpt2`: " in docs.read_text()


@pytest.mark.parametrize(("outcome", "status"), [("different", 1), ("failed", 1), ("close", 0)])
def test_the_status_says_whether_any_is_wrong(
    outcome: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f'{{"family": "torch", "name": "vit", "outcome": "{outcome}"}}\n'
    (tmp_path / runner.FILE).write_text(line)
    monkeypatch.setattr(runner, "run", lambda wanted, *_: iter(()))
    assert main(["zoo", "--out", str(tmp_path), "--only", "torch/vit"]) == status


def test_what_has_nothing_to_compare_with_does_not_count() -> None:
    found = [Outcome("torch", name, o) for name, o in [("a", "right"), ("b", "no eager")]]
    assert summary(found).splitlines()[-1].endswith("| 1 of 1, 100.0% |")
    assert markdown(found, 4).endswith("\ntorch: a\n")


def test_reasons_do_not_say_where_packages_are() -> None:
    where = "at /home/a/.venv/lib/python3/site-packages/transformers/x.py:3 (no)"
    text = markdown([Outcome("torch", "a", "refused", where)], 4)
    assert "- `torch/a`: at transformers/x.py:3 (no)\n" in text


def test_transformers_is_missed_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers.models.auto", None)
    assert main(["zoo"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "transformers is needed" in line
    assert "pip install 'pipecompile[hf]'" in line
