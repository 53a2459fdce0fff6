"""The examples as processes of their own, in short form: each comes to what one device does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
SHORT = {
    "vit_images": ("--epochs", "1", "--train", "48", "--validation", "32", "--layers", "1"),
    "finetune_bert": ("--epochs", "2", "--train", "30", "--validation", "20"),
    "tag_tokens": ("--epochs", "1", "--train", "48", "--validation", "20"),
    "distill": ("--steps", "3", "--teacher-steps", "2"),
    "seq2seq": ("--epochs", "1", "--train", "64", "--validation", "16", "--layers", "1"),
}
"""Of each script, the options with which it takes seconds."""
SAYS = {
    "vit_images": r"^epoch 1: validation loss [\d.]+, top-1 accuracy [01]\.\d+$",
    "finetune_bert": r"^epoch 2: validation loss [\d.]+, accuracy [01]\.\d+$",
    "tag_tokens": r"^ +attribute +[01]\.\d+ +[01]\.\d+ +[01]\.\d+ +\d+$",
    "distill": r"^held-out text: teacher [\d.]+, student [\d.]+; .* in [\d.]+%$",
    "seq2seq": r"^epoch 1: validation loss [\d.]+, [\d.]+% of the letters right$",
}


def ran(script: str, *options: str, processes: int = 1) -> str:
    """What it prints."""
    start = (*TORCHRUN, str(processes)) if processes > 1 else ()
    command = [sys.executable, *start, str(ROOT / f"examples/{script}.py"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


def assert_equal(printed: str, losses: int) -> None:
    """All losses, of so many steps, and all parameters are those of one device."""
    first_and_last = re.findall(r"^(?:\d+ stages, \d+ replicas|one device) +(.*)$", printed, re.M)
    assert len(first_and_last) == 2
    assert first_and_last[0] == first_and_last[1]
    assert f"losses equal: {losses} of {losses}\n" in printed
    (equal, of) = re.findall(r"^parameters equal: (\d+) of (\d+)$", printed, re.M)[0]
    assert int(equal) == int(of) > 10


STEPS = {"vit_images": 2, "finetune_bert": 6, "tag_tokens": 3, "distill": 3, "seq2seq": 2}


@pytest.mark.slow
@pytest.mark.parametrize("script", SHORT)
def test_one_process_comes_to_what_one_device_does(script: str) -> None:
    printed = ran(script, *SHORT[script], "--compare")
    assert re.search(SAYS[script], printed, re.M), printed
    assert_equal(printed, STEPS[script])


@pytest.mark.slow
@pytest.mark.parametrize("script", SHORT)
def test_two_processes_come_to_what_one_device_does(script: str) -> None:
    printed = ran(script, *SHORT[script], "--compare", processes=2)
    assert len(re.findall(SAYS[script], printed, re.M)) == 1, printed  # by one of them
    assert_equal(printed, STEPS[script])


@pytest.mark.slow
def test_bert_in_bf16_comes_to_what_autocast_does() -> None:
    printed = ran("finetune_bert", *SHORT["finetune_bert"], "--precision", "bf16", "--compare")
    assert_equal(printed, 6)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 4])
def test_bert_on_two_replicas_comes_to_what_one_device_does(processes: int) -> None:
    """Between processes each replica pads its rows to its own longest."""
    options = (*SHORT["finetune_bert"], "--dp", "2", "--compare")
    assert_equal(ran("finetune_bert", *options, processes=processes), 6)


@pytest.mark.slow
def test_t5_comes_to_what_one_device_does() -> None:
    assert_equal(ran("seq2seq", *SHORT["seq2seq"], "--model", "t5", "--compare"), 2)


STREAM = ("--shards", "1", "--batch", "16", "--layers", "1", "--width", "32")


@pytest.mark.slow
def test_a_stream_goes_on_in_the_middle_of_an_epoch_under_other_processes(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path), *STREAM)
    printed = ran("pretrain_stream", *out, "--validate-every", "2", "--stop-after", "3")
    assert "step 2  evaluated: loss " in printed
    assert "stopped by SIGUSR1 on rank 0 after step 3 of " in printed
    printed = ran("pretrain_stream", *out, "--stop-after", "7", "--compare", processes=2)
    assert "goes on in epoch 0, after batch 3\n" in printed
    assert_equal(printed, 4)


@pytest.mark.slow
def test_a_process_whose_stage_reads_nothing_reads_no_shard(tmp_path: Path) -> None:
    options = ("--out", str(tmp_path), *STREAM, "--layers", "2", "--stages", "3", "--stop-after")
    printed = ran("pretrain_stream", *options, "4", "--compare", processes=3)
    read = dict(re.findall(r"process (\d) has read (\d+) rows to train", printed))
    assert read == {"0": "64", "1": "0", "2": "64"}
    assert_equal(printed, 4)
