"""What copies of the state in memory cost per step: `make elastic-table`. Prints Markdown.

Two processes, one thread each, train the GPT-2-like model of `tests/support/rivals.py` on two
stages. The ways take turns, the first of a round another one each time; a ratio is the median of
the rounds' ratios, and its spread their quartiles. A number as the argument is that of the rounds.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers
os.environ.setdefault("PIPECOMPILE_COSTS", "roofline")

from support.gang import Gang
from support.snapshotted import state_bytes, training

WARM_UP, ROUNDS = 2, 15
WAYS = ("no copies", "one machine", "two machines")


def main(arguments: list[str]) -> None:
    rounds = int(arguments[0]) if arguments else ROUNDS
    gang = Gang(2)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for number in range(WARM_UP + rounds):
            first = number % len(WAYS)
            for way in WAYS[first:] + WAYS[:first]:
                took_s = max(gang.run(training, way, folder))
                if number >= WARM_UP:
                    seconds[way].append(took_s)
        kept = [each / 2**20 for each in gang.run(state_bytes, folder)]
        gang.close()
    print(f"state of the ranks: {kept[0]:.0f} and {kept[1]:.0f} MiB\n")
    print("| copies | a step, median | to none | quartiles |\n| --- | ---: | ---: | ---: |")
    for way, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[WAYS[0]], strict=True)]
        low, _, high = quantiles(ratios)
        figures = f"{median(times) * 1e3:.0f} ms | {median(ratios):.3f} × | {low:.3f} – {high:.3f}"
        print(f"| {way} | {figures} |")


if __name__ == "__main__":
    main(sys.argv[1:])
