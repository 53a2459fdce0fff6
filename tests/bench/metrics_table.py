"""What metrics, callbacks and gathering cost: `make metrics-table`. Prints Markdown.

Two processes, one thread each, train the GPT-2-like model of `tests/support/rivals.py` on two
stages. The ways take turns within one run, the first of a round another one each time; a ratio is
the median of the rounds' ratios, and its spread their quartiles. A number as the argument is that
of the rounds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers
os.environ.setdefault("PIPECOMPILE_COSTS", "roofline")

from support.gang import Gang
from support.metered import evaluating, training

WARM_UP, ROUNDS = 2, 20
STEPS = ("nothing measured", "metrics", "CSV and JSONL", "live line")
EVALUATIONS = (
    "evaluate",
    "evaluate(metrics=accuracy)",
    "forward",
    'forward(gather="main")',
    'forward(gather="all")',
    "predict(fn=argmax)",
)


def table(
    gang: Gang, what: str, run: Callable[[str], float], ways: tuple[str, ...], rounds: int
) -> None:
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(WARM_UP + rounds):
        first = round_ % len(ways)
        for way in ways[first:] + ways[:first]:
            took = max(gang.run(run, way))
            if round_ >= WARM_UP:
                seconds[way].append(took)
    print(f"\n| {what} | median | to the first | quartiles |\n| --- | ---: | ---: | ---: |")
    for way, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[ways[0]], strict=True)]
        low, _, high = quantiles(ratios)
        print(
            f"| {way} | {median(times) * 1e3:.1f} ms | {median(ratios):.4f} × "
            f"| {low:.3f} – {high:.3f} |",
            flush=True,
        )


def main(arguments: list[str]) -> None:
    rounds = int(arguments[0]) if arguments else ROUNDS
    gang = Gang(2)
    table(gang, "a step", training, STEPS, rounds)
    table(gang, "a batch of 16 × 128 tokens, 4,096 classes", evaluating, EVALUATIONS, rounds)
    gang.close()


if __name__ == "__main__":
    main(sys.argv[1:])
