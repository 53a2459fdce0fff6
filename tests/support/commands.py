"""Running `pipecompile inspect` inside a test."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pipecompile.compiler.cli.main import main

SMALL_GPT2 = "hf:gpt2 --set n_layer=2 --set n_embd=64 --set n_head=2 --set vocab_size=512 --seq 32"


def inspect(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints on stdout; it must succeed."""
    code = main(["inspect", *command.split()])
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out


def plan_of(command: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The plan that the command prints with --json."""
    made: dict[str, Any] = json.loads(inspect(f"{command} --json", capsys))
    return made
