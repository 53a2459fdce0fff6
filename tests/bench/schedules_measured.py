"""Steps of every schedule, measured between processes; `make schedules-bench`. Prints Markdown.

Real processes over gloo, one thread each, train the GPT-2-like model of `tests/support/rivals.py`
at the prices that are measured here. All rivals take turns, and a ratio is the median of the
rounds' ratios. CPU is what all processes use in a step, their threads for messages included.

The second table is `pipecompile diff` of some of them: the bubble that was planned, the one that
the simulator finds for the measured seconds of each computation, and the measured one.

Numbers as arguments choose among the numbers of processes (2 and 4).
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers

from pipecompile.compiler.trace.difference import difference
from pipecompile.compiler.trace.reading import read_trace
from support.gang import Gang
from support.schedule_rivals import Limit, Ours, Rival, Torchs, step, traced

WARM_UP, ROUNDS, STEPS = 2, 15, 10
USUAL = Ours("1f1b")
RIVALS: list[Rival] = [
    USUAL,
    Ours("interleaved", 2),
    Ours("zb_h1"),
    Ours("zb"),
    Ours("zb", 2),
    Ours("zb_v", 2),
    Ours("v_half", 2),
    Ours("v_min", 2),
    Torchs("1F1B"),
    Torchs("Interleaved1F1B", 2),
    Torchs("InterleavedZeroBubble", 2),
    Torchs("ZBVZeroBubble", 2),
    Limit(),
]
TRACED = [rival for rival in RIVALS if isinstance(rival, Ours)][:6]


def _ratio(times: dict[Rival, list[float]], other: Rival, to: Rival) -> float:
    return median(a / b for a, b in zip(times[other], times[to], strict=True))


def steps_table(gang: Gang, processes: int) -> None:
    seconds: dict[Rival, list[float]] = {rival: [] for rival in RIVALS}
    cpu: dict[Rival, list[float]] = {rival: [] for rival in RIVALS}
    for round_ in range(WARM_UP + ROUNDS):
        for rival in RIVALS:
            found = gang.run(step, rival)
            if round_ >= WARM_UP:
                seconds[rival].append(max(took for took, _ in found))
                cpu[rival].append(sum(used for _, used in found))
    print(f"\n| {processes} processes | step | our 1f1b is | of the limit | CPU of our 1f1b's |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for rival in RIVALS:
        print(
            f"| {rival} | {median(seconds[rival]) * 1e3:.0f} ms "
            f"| {_ratio(seconds, rival, USUAL):.2f} × | {_ratio(seconds, RIVALS[-1], rival):.2f} "
            f"| {_ratio(cpu, rival, USUAL):.2f} |",
            flush=True,
        )


def bubbles_table(gang: Gang, processes: int, folder: str) -> None:
    print(f"\n| {processes} processes | planned | simulated | measured | planned step | measured |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for number, way in enumerate(TRACED):
        run = Path(folder) / f"run-{processes}-{number}.json"
        plan = Path(folder) / f"plan-{processes}-{number}.json"
        gang.run(traced, way, str(run), str(plan), STEPS)
        found = difference(read_trace(plan), read_trace(run))
        assert found.bubble is not None
        print(
            f"| {way} | {found.bubble.planned:.1%} | {found.simulated_bubble:.1%} "
            f"| {found.bubble.measured:.1%} | {found.step_s.planned * 1e3:.0f} ms "
            f"| {found.step_s.measured * 1e3:.0f} ms |",
            flush=True,
        )


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PIPECOMPILE_CACHE"] = folder  # measured anew, and once for all
        for processes in map(int, arguments or ["2", "4"]):
            gang = Gang(processes)
            bubbles_table(gang, processes, folder)
            steps_table(gang, processes)
            gang.close()


if __name__ == "__main__":
    main(sys.argv[1:])
