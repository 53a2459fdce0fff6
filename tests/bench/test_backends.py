"""Throughput of each backend in one process: `make bench`, and a guard in ratios, not seconds."""

from __future__ import annotations

from typing import Any

import pytest
from bench import backend_table as table

ROUNDS = 9


@pytest.mark.bench
@pytest.mark.parametrize("who", table.CONTENDERS)
def test_throughput(benchmark: Any, who: str) -> None:
    benchmark.group = "one training step of GPT-2, 1 process"
    benchmark.extra_info["tokens"] = table.ROWS * table.LENGTH
    step = table.CONTENDERS[who]("gpt2", "fp32")
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)


@pytest.mark.slow
def test_fused_kernels_are_worth_it() -> None:
    """Beside eager kernels, and beside torch.compile of the plain model, up to what a busy machine
    blurs; the figures are in docs/backends.md."""
    steps = {who: make("gpt2", "fp32") for who, make in table.CONTENDERS.items() if who != "eager"}
    table.taking_turns(steps, 2)
    seconds = table.taking_turns(steps, ROUNDS)
    assert table.faster(seconds, "ours, inductor", than="ours, eager") > 1.0
    assert table.faster(seconds, "ours, inductor", than="torch.compile") > 0.95
