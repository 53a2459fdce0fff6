"""What the documents show runs: their Python blocks, and the example, started both ways."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import models

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.mark.parametrize(
    "document",
    [
        pytest.param("README.md", marks=pytest.mark.slow),
        pytest.param("docs/guide.md", marks=pytest.mark.slow),
        pytest.param("docs/training.md", marks=pytest.mark.slow),
        pytest.param("docs/from_hf.md", marks=pytest.mark.slow),
        pytest.param("docs/metrics.md", marks=pytest.mark.slow),
        "docs/checkpoints.md",
        pytest.param("docs/inference.md", marks=pytest.mark.slow),
        "docs/elastic.md",
    ],
)
def test_the_blocks_of_a_document_run(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, in one namespace that starts with a tiny model, its batch and an optimizer."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {
        "__name__": "__main__",
        "model": models.gpt2(n_layer=2),
        "batch": models.tokens(16),
        "adamw": partial(torch.optim.AdamW, lr=1e-3),
    }
    text = (ROOT / document).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == len(re.findall(r"^```python", text, re.MULTILINE)) > 0
    for block in blocks:
        above = "\n" * text[: block.start(1)].count("\n")  # tracebacks show the document's lines
        exec(compile(above + block[1], document, "exec"), namespace)


def _losses(dp: int, *start: str) -> list[str]:
    example = str(ROOT / "examples/train_gpt2.py")
    small = ("--steps", "2", "--layers", "2", "--width", "64")
    command = [sys.executable, *start, example, *small, "--dp", str(dp)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return re.findall(r"^(?:step|held-out text).*loss \d+\.\d{6}$", run.stdout, re.MULTILINE)


@pytest.mark.slow
def test_the_elastic_example_runs_in_one_process(tmp_path: Path) -> None:
    """And goes on from its checkpoint."""
    example = [sys.executable, str(ROOT / "examples/elastic.py"), "--dir", str(tmp_path / "run")]
    for steps, first in ((2, 0), (4, 2)):
        run = subprocess.run(
            [*example, "--steps", str(steps), "--save-every", "1"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr
        found = re.findall(r"^step +(\d+)  loss \d", run.stdout, re.MULTILINE)
        assert [int(number) for number in found] == list(range(first, steps))


@pytest.mark.slow
def test_the_example_prints_its_losses() -> None:
    # the first and the last step, and the held-out text, once by the callback
    assert len(_losses(1)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("dp", [1, 2])
def test_the_example_prints_the_same_losses_in_one_process_and_in_many(dp: int) -> None:
    losses = _losses(dp)
    assert len(losses) == 3
    assert _losses(dp, *TORCHRUN, str(2 * dp)) == losses


@pytest.mark.slow
def test_three_changed_lines_print_what_trainer_prints(tmp_path: Path) -> None:
    printed = []
    small = ["--rows", "40", "--width", "32", "--epochs", "1", "--output", str(tmp_path / "run")]
    example = str(ROOT / "examples/finetune_trainer.py")
    for start, options in (((), ["--plain"]), ((), []), (TORCHRUN, [])):
        count = ["2"] if start else []
        command = [sys.executable, *start, *count, example, *small, *options]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        printed += re.findall(r"^held-out loss (\S+) accuracy (\S+)$", run.stdout, re.MULTILINE)
    assert len(printed) == 3
    for loss, accuracy in printed[1:]:
        assert abs(float(loss) - float(printed[0][0])) < 1e-5
        assert accuracy == printed[0][1]
