"""Does what the plan predicts come true? Prints a table; `make predictions` runs it.

For every setting, real processes train with measured prices. The plan's step time is compared with
the median of the steps, its peak memory with the live tensor storage that a dispatch mode counts
during a step over gloo (what goes through shared memory is no tensor's), its order of stages by
load with their measured busy times. Words as arguments choose the settings that have all of them.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers

from bench import models

ROUNDS, STEPS = 3, 5
NOISE = 0.05  # stages whose loads differ by less are as good as equal


@dataclass(frozen=True)
class Setting:
    model: str
    n_stages: int
    microbatches: int
    remat: str
    share: float | None = None
    """Budget between what full recomputation needs (0) and none (1)."""
    dp: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `pipecompile.compile`."""

    def __str__(self) -> str:
        budget = "" if self.share is None else f", {self.share:.0%} of the stash"
        replicas = "" if self.dp == 1 else f" × {self.dp} replicas"
        told = "".join(f", {name}={value}" for name, value in self.options.items())
        stages = f"{self.n_stages} stages{replicas}, {self.microbatches} mb"
        return f"{self.model}, {stages}, {self.remat}{budget}{told}"


SETTINGS = [
    Setting("gpt2", 2, 8, "none"),
    Setting("gpt2", 2, 4, "full"),
    Setting("gpt2", 2, 8, "auto", 0.4),
    Setting("llama", 2, 8, "none"),
    Setting("llama", 2, 8, "auto", 0.3),
    Setting("llama", 1, 4, "none"),
    Setting("bert", 2, 16, "none"),
    Setting("t5", 2, 8, "full"),
    Setting("llama", 1, 8, "none", dp=2, options={"zero": 1}),
    Setting("gpt2", 1, 8, "none", dp=2, options={"zero": 2}),
    Setting("gpt2", 2, 8, "none", options={"schedule": "zb_h1"}),
    Setting("bert", 2, 8, "none", options={"schedule": "interleaved", "virtual_stages": 2}),
    Setting("llama", 2, 8, "none", options={"precision": "bf16_params"}),
    Setting("t5", 2, 16, "none"),
]


@dataclass(frozen=True)
class Found:
    """What one process has measured."""

    step_s: float
    predicted_s: float
    peak_bytes: int
    predicted_bytes: int
    busy_s: float
    predicted_busy_s: float


def measure(setting: Setting, cache: str) -> Found:
    """Train as this process's rank; prices are measured anew if the cache is empty."""
    import pipecompile
    from pipecompile.runtime.executor import Executor
    from pipecompile.runtime.transport.neighbours import SWITCH
    from support.measured import peak_bytes

    torch.set_num_threads(1)
    os.environ["PIPECOMPILE_CACHE"] = cache
    batch = models.batch(2 * setting.microbatches)

    def compiled(costs: str, **options: Any) -> Any:
        return pipecompile.compile(
            models.build(setting.model),
            setting.n_stages,
            dp=setting.dp,
            microbatches=setting.microbatches,
            optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
            max_grad_norm=1.0,
            tied_grads="per_step",
            example_batch=batch,
            costs=costs,
            **{**setting.options, **options},
        )

    memory = None
    if setting.share is not None:
        low, high = (
            max(stage.memory.peak for stage in compiled("roofline", remat=remat).plan.stages)
            for remat in ("full", "none")
        )
        memory = int(low + setting.share * (high - low))
    pipe = compiled("profile", remat=setting.remat, memory=memory)
    (rank,) = pipe._session.state.ranks.values()
    stages = [pipe.plan.stages[stage] for stage in rank.stages]
    for _ in range(2):
        pipe.step(batch)
    busy: list[float] = []
    original = Executor._compute

    def timed(self: Executor, *args: Any) -> None:
        start = time.perf_counter()
        original(self, *args)
        busy.append(time.perf_counter() - start)

    steps = []
    Executor._compute = timed  # type: ignore[method-assign]
    for _ in range(STEPS):
        dist.barrier()
        start = time.perf_counter()
        pipe.step(batch)
        steps.append(time.perf_counter() - start)
    Executor._compute = original  # type: ignore[method-assign]
    predicted_busy = sum(s.forward_s + s.backward_s + s.recompute_s for s in stages)
    with mock.patch.dict(os.environ, {SWITCH: "off"}):
        over_gloo = compiled("profile", plan=pipe.plan)
        over_gloo.step(batch)
        peak = peak_bytes(over_gloo, batch)
    return Found(
        median(steps),
        pipe.plan.step_s,
        peak,
        stages[0].memory.peak,
        sum(busy) / STEPS,
        predicted_busy * setting.microbatches,
    )


def rounds(setting: Setting, count: int) -> list[list[Found]]:
    """What every process found, in several rounds, each with prices of its own."""
    from bench.predictions import measure as share  # by a name that its processes can import
    from support.gang import Gang

    gang = Gang(setting.n_stages * setting.dp)
    found = []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as cache:
            found.append(gang.run(share, setting, cache))
    gang.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Plans, and what came true of them.")
    parser.add_argument("words", nargs="*", help="of settings, such as gpt2 zero=2; by default all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--list", action="store_true", help="the settings")
    args = parser.parse_args()
    chosen = [each for each in SETTINGS if all(word in _words(each) for word in args.words)]
    if args.list:
        print("\n".join(map(str, chosen)))
    elif chosen:
        table(chosen, args.rounds)
    else:
        parser.error(f"no setting has all of {args.words}; --list lists them")


def table(settings: Sequence[Setting], count: int) -> None:
    """Measure, and print a line for each."""
    print(
        f"medians of {count} rounds, each measures prices and then {STEPS} steps\n\n"
        "| setting | step | predicted | error | peak of each stage | predicted | error "
        "| busy last : first stage | predicted |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    errors, memory_errors, orders = [], [], []
    for setting in settings:
        found = rounds(setting, count)
        step_s = [max(each.step_s for each in ranks) for ranks in found]
        predicted_s = [ranks[0].predicted_s for ranks in found]
        errors.append(median(p / s - 1 for p, s in zip(predicted_s, step_s, strict=True)))
        last = found[-1]
        wrong = [each.predicted_bytes / each.peak_bytes - 1 for each in last]
        memory_errors += wrong
        ratios = [(ranks[-1].busy_s / ranks[0].busy_s, _ratio(ranks)) for ranks in found]
        real, guessed = (median(column) for column in zip(*ratios, strict=True))
        near = abs(real - 1) < NOISE or abs(guessed - 1) < NOISE
        orders.append(near or (real > 1) == (guessed > 1))
        print(
            f"| {setting} | {median(step_s) * 1e3:.0f} ms | {median(predicted_s) * 1e3:.0f} ms "
            f"| {errors[-1]:+.1%} | {_mib(each.peak_bytes for each in last)} "
            f"| {_mib(each.predicted_bytes for each in last)} "
            f"| {', '.join(f'{w:+.1%}' for w in wrong)} | {real:.2f} | {guessed:.2f} |",
            flush=True,
        )
    print(
        f"\nstep: median error {median(map(abs, errors)):.1%}, largest "
        f"{max(map(abs, errors)):.1%}; peak: largest error {max(map(abs, memory_errors)):.2%}; "
        f"order of load right, or within {NOISE:.0%} of equal, in {sum(orders)} of {len(orders)}"
    )


def _words(setting: Setting) -> list[str]:
    return str(setting).replace(",", "").split()


def _ratio(ranks: list[Found]) -> float:
    return ranks[-1].predicted_busy_s / ranks[0].predicted_busy_s


def _mib(sizes: Iterable[int]) -> str:
    return ", ".join(f"{size / 2**20:.1f}" for size in sizes) + " MiB"


if __name__ == "__main__":
    main()
