"""The command itself: what it installs, and what it writes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from gpu import environment, figures
from packaging.requirements import Requirement
from support.gpu_models import CONTENDERS, SIZES, SMALL


def packages(requirement: str) -> Iterator[str]:
    """What is installed for it here, by what packages say that they require."""
    asked = Requirement(requirement)
    if asked.marker is None or asked.marker.evaluate({"extra": ""}):
        yield asked.name
        for each in metadata.requires(asked.name) or ():
            yield from packages(each)


def test_torch_is_never_asked_for(tmp_path: Path) -> None:
    needed = environment.needed()
    assert "torch" not in {name for each in needed for name in packages(each)}
    assert {"pulp", "highspy", "rich", "xxhash", "transformers", "pytest"} <= {
        each.partition(">")[0] for each in needed
    }
    assert "--no-index" in environment.install(Path(sys.executable), tmp_path)
    assert "--constraint" in environment.download(tmp_path, "3.12")


def test_without_a_torch_the_error_says_which_python(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "_torch_version", lambda: (2, 10))
    with pytest.raises(SystemExit, match=r"torch 2\.11 or later: say which, GPU_PYTHON"):
        environment.make(tmp_path / "env", tmp_path / "wheels")
    assert not (tmp_path / "env").exists()


def test_what_fails_or_has_no_time_is_a_word_in_the_table(monkeypatch: Any) -> None:
    """And each contender is begun only while there is time."""
    clock = iter([0.0, 100.0, 300.0, 485.0, 495.0])
    monkeypatch.setattr(figures.time, "monotonic", lambda: next(clock, 500.0))
    monkeypatch.setattr(
        figures,
        "in_a_process",
        lambda size, who, device, limit_s: {"error": f"{who}, {limit_s:.0f} s"},
    )
    found = figures.all_rows(SIZES, "cpu", 500.0)
    texts = [row["error"] for rows in found.values() for row in rows.values()]
    assert sum(text.startswith("skipped") for text in texts) == 2 * len(CONTENDERS) - 3
    assert found["Llama-1B shape"]["torch.compile"] == {"error": "torch.compile, 400 s"}
    assert "| plain, eager | skipped: no time left |" in "\n".join(
        figures.table(SIZES[0], found["GPT-2 small"])
    )


def test_a_table_has_ratios_to_torch_compile() -> None:
    rows = {
        "torch.compile": {"step_s": 0.2},
        "ours, eager": {"step_s": 0.1, "peak_bytes": 3 << 30, "kernels": 0.5},
    }
    *_, ours, _ = figures.table(SMALL[0], rows)
    assert ours == "| ours, eager | 100.0 ms | 1,280 | 2.00× | 50% | 3.00 GiB |  |  |  |"


def test_only_what_stands_between_the_markers_is_written() -> None:
    text = f"a\n{figures.BEGIN}\nold\n{figures.END}\nb\n"
    assert figures.written(text, "new") == f"a\n{figures.BEGIN}\n\nnew\n{figures.END}\nb\n"
    assert figures.written(figures.written(text, "newer"), "new") == figures.written(text, "new")
    with pytest.raises(SystemExit, match="no <!-- figures -->"):
        figures.written("a", "new")


@pytest.mark.slow
def test_the_whole_script_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "gpu.md"
    document.write_text(f"{figures.BEGIN}\n{figures.END}\n")
    figures.main(["--device", "cpu", "--small", "--seconds", "110", "--write", str(document)])
    written = document.read_text()
    assert written.count("needs CUDA") == 2
    for who in ("torch.compile", "plain, eager", "ours, eager", "ours, inductor"):
        assert f"| {who} | " in written
        assert " ms | " in written.partition(f"| {who} | ")[2].partition("\n")[0]
