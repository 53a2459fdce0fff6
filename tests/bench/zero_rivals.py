"""Steps of 2 stages × 2 replicas: pipecompile against FSDP2 and DeepSpeed. Prints Markdown.

`make zero-bench` runs it. Four processes of one thread each over gloo, paired: all contenders
take turns within one round, and a ratio is the median of the rounds' ratios. With fewer cores
than processes the bubble of one is time for another: then the CPU seconds decide. Words as
arguments choose the contenders whose names contain one of them.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers

from support import deepspeed_rival, rivals, sharded
from support.gang import Gang

WARM_UP, ROUNDS = 2, 15
TOLERANCE = 1e-5  # of losses, relative


def turn(gang: Gang, name: str, optimizer: str = "adamw") -> sharded.Turn:
    """The slowest rank's seconds, the CPU seconds of all, and the mean loss of the replicas."""
    turns: list[sharded.Turn] = gang.run(sharded.step, name, optimizer)
    losses = [turn.loss for turn in turns if turn.loss is not None]
    return sharded.Turn(
        seconds=max(turn.seconds for turn in turns),
        cpu_s=sum(turn.cpu_s for turn in turns),
        loss=mean(losses),
    )


def first_losses(gang: Gang, names: Sequence[str], optimizer: str) -> dict[str, list[Any]]:
    """Of the first steps: from the second on they show what the optimizer did."""
    return {name: [turn(gang, name, optimizer).loss for _ in range(WARM_UP)] for name in names}


def apart(losses: Mapping[str, Sequence[float]]) -> float:
    """The largest relative difference between two contenders at the same step."""
    steps = list(zip(*losses.values(), strict=True))
    return max((max(step) - min(step)) / min(step) for step in steps)


def measured(gang: Gang, names: Sequence[str], rounds: int) -> dict[str, list[sharded.Turn]]:
    """Each contender's turn in each round; every round starts with another of them."""
    turns: dict[str, list[sharded.Turn]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in (*names[first:], *names[:first]):
            turns[name].append(turn(gang, name))
    return turns


def table(turns: Mapping[str, Sequence[sharded.Turn]]) -> None:
    seconds = {name: [turn.seconds for turn in each] for name, each in turns.items()}
    ours = [name for name in seconds if name in sharded.OURS]
    heads = [f"{name.removeprefix('pipecompile, ')} is" for name in ours]
    print(f"| | step | CPU | {' | '.join(heads)} |")
    print(f"|---|--:|--:|{'--:|' * len(ours)}")
    for name, times in seconds.items():
        cells = [_faster(seconds[mine], times) if mine != name else "" for mine in ours]
        cpu_s = median(turn.cpu_s for turn in turns[name])
        print(f"| {name} | {median(times):.2f} s | {cpu_s:.2f} s | {' | '.join(cells)} |")


def _faster(mine: Sequence[float], other: Sequence[float]) -> str:
    """How many times as fast, and the quartiles of that."""
    low, middle, high = quantiles([b / a for a, b in zip(mine, other, strict=True)], n=4)
    return f"{middle:.2f}× ({low:.2f}–{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps of 2 stages × 2 replicas, and of rivals.")
    parser.add_argument("words", nargs="*", help='of contenders, such as "zero=1" FSDP2')
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="2 or more")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if not deepspeed_rival.INSTALLED:
        print("Without DeepSpeed, which is not installed: pip install -e '.[rivals]'\n")
    wanted = [word.lower() for word in args.words] or [""]
    names = [n for n in sharded.contenders() if any(word in n.lower() for word in wanted)]
    if not names:
        parser.error(f"of {', '.join(sharded.contenders())}, none has one of {wanted}")
    gang = Gang(sharded.STAGES * sharded.REPLICAS)
    losses = first_losses(gang, names, "adamw")
    if (difference := apart(losses)) > TOLERANCE:
        sys.exit(f"the contenders do not train the same: {losses}")
    turns = measured(gang, names, args.rounds)
    gang.close()
    print(
        f"Step of a GPT-2-like model, layers × width {rivals.NARROW}, {sharded.STAGES} stages × "
        f"{sharded.REPLICAS} replicas, {rivals.ROWS} × {rivals.LENGTH} tokens per replica in "
        f"{rivals.MICROBATCHES} microbatches, AdamW, fp32, {os.cpu_count()} cores: medians (and "
        f"quartiles) of {args.rounds} rounds, CPU seconds of all processes. The first {WARM_UP} "
        f"losses of all are within {difference:.0e} of each other\n"
    )
    table(turns)


if __name__ == "__main__":
    main()
