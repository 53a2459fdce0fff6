"""Whole runs that fail: what torchrun starts again, how processes end, what they leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pipecompile.runtime.transport.neighbours import SWITCH
from support.gang import free_port
from support.scripts import SMALL

LIMIT_S = 90

SCRIPT = (
    """
import os, sys, time
import pipecompile, torch
from pipecompile.compiler.driver.builder import Builder
from pipecompile.runtime.exchange import watchdog

how, rank = sys.argv[1], int(os.environ["RANK"])
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
watchdog.POLL_S, watchdog.GRACE_S = 0.1, 0.5  # then a compile is long that takes 3 s
build = Builder.build
def odd(*args, **options):
    if attempt and rank == 0:
        time.sleep(3)
    if how == "compiling" and not attempt and rank == 1:
        raise ArithmeticError("no graph")
    return build(*args, **options)
Builder.build = odd

"""
    + SMALL
    + """
print(f"trained {rank} in attempt {attempt}\\n", end="", flush=True)
if not attempt and rank == 1:
    if how == "killed":
        os.kill(os.getpid(), 9)
    if how == "error":
        raise ArithmeticError("no numbers")
    if how == "ends":
        sys.exit(0)
while how == "goes on":
    pipe.step(batch)
pipe.step(batch)
print(f"finished {rank} in attempt {attempt}\\n", end="", flush=True)
"""
)


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def written(folder: Path, before: str = "") -> str:
    script = folder / "train.py"
    script.write_text(before + SCRIPT)
    return str(script)


def restarted(script: str, how: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Under torchrun, which starts it again once."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "--max-restarts", "1", script, how],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "error", "compiling"])
def test_a_restart_knows_nothing_of_the_attempt_before(tmp_path: Path, how: str) -> None:
    """Its compile takes longer than a watchdog waits for those that others gave up."""
    made = restarted(written(tmp_path), how)
    assert made.returncode == 0, made.stderr
    for rank in range(2):
        assert f"finished {rank} in attempt 1" in made.stdout
    assert "connectFullMesh" not in made.stderr


@pytest.mark.slow
def test_a_group_that_the_script_makes_knows_nothing_of_it_where_agents_keep_their_store(
    tmp_path: Path,
) -> None:
    """Each attempt then has a store, and a port, of its own, for torch's addresses too."""
    own = 'import torch.distributed\ntorch.distributed.init_process_group("gloo")\n'
    own += "ranks = torch.distributed.new_group([0, 1])\n"
    made = restarted(written(tmp_path, own), "killed", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert made.returncode == 0, made.stderr
    assert "connectFullMesh" not in made.stderr
    assert "finished 1 in attempt 1" in made.stdout


def started(folder: Path, how: str, shared: str) -> list[subprocess.Popen[str]]:
    """Two ranks, without torchrun: rank 0 keeps the store."""
    port, script = str(free_port()), written(folder)
    return [
        subprocess.Popen(
            [sys.executable, script, how],
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                TMPDIR=str(folder / "temporary"),
                **{SWITCH: shared},
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """What all say; they end by themselves."""
    try:
        return [process.communicate(timeout=LIMIT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["", "off"])
@pytest.mark.parametrize("how", ["killed", "ends", "error"])
def test_survivors_end_with_one_short_message(tmp_path: Path, how: str, shared: str) -> None:
    (tmp_path / "temporary").mkdir()
    processes = started(tmp_path, how, shared)
    (_, survivor), _ = ended(processes)
    assert processes[0].returncode == 1, "not -6: no thread is ended inside of gloo or the store"
    assert "terminate called" not in survivor
    first, *rest = survivor.splitlines()
    assert first == "Traceback (most recent call last):"
    assert "train.py" in rest[0]
    assert "pipe.step(batch)" in rest[1]
    assert rest[2].startswith(
        "pipecompile.compiler.ir.errors.PeerFailedError: rank 1 (stage 1, replica 0) "
    )
    assert len(rest) < 12
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.slow
def test_an_interrupt_is_one_line_per_rank(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    processes = started(tmp_path, "goes on", "")
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    time.sleep(0.2)
    for process in processes:
        process.send_signal(signal.SIGINT)
    for rank, (_, said) in enumerate(ended(processes)):
        assert processes[rank].returncode == -signal.SIGINT
        (line,) = said.splitlines()
        assert line.startswith(f"pipecompile: rank {rank} was interrupted at ") or "died" in line
