"""The same faults of a training by this library, by DDP and by DeepSpeed. Prints Markdown.

`make chaos-rivals` runs it: of each kind some faults, in an order that the seed draws, of two
agents with a worker each. A fault comes when the run has gone on after the one before.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.chaos import RANKS, ours, suffered
from support import chaos_rival
from support.chaos import TIMEOUT_S, Chaos, Fault

KINDS = ("killed", "error", "stopped", "full", "slow", "machine")
LAST = {"full": 1, "stopped": 2}
OURS = "this"
MINUTES = 60.0


def faults_of(seed: int, each: int, of: Sequence[str] = KINDS) -> list[Fault]:
    """So many of each kind, and as many of rank 0 as of rank 1 where that can be. Those that not
    every contender survives come last."""
    chance = random.Random(seed)
    kinds = [(kind, number) for kind in of for number in range(each)]
    chance.shuffle(kinds)
    kinds.sort(key=lambda each: LAST.get(each[0], 0))
    return [
        Fault(kind, (number + seed) % RANKS, chance.uniform(0, 1.5), False, 2.0)
        for kind, number in kinds
    ]


def commands_of(name: str, folder: Path) -> tuple[list[str], list[str]]:
    """Of a run that saves in ``checkpoints``, and of one that saves elsewhere."""
    if name == OURS:
        return ours(folder)
    script = chaos_rival.script_of(folder, name)
    folders = [folder / "checkpoints", folder / "others"]
    for each in folders:
        each.mkdir()
    with_, without = ([script, str(10**6), str(each), str(TIMEOUT_S)] for each in folders)
    return with_, without


def rows(names: Sequence[str], went: dict[str, Chaos]) -> list[str]:
    """The table: a line for each kind of fault, a column for each contender."""
    lines = [f"| | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for kind in KINDS:
        lines.append(f"| {kind} | {' | '.join(_cell(went[name], kind) for name in names)} |")
    lines.append(f"| steps done twice | {' | '.join(_twice(went[name]) for name in names)} |")
    lines.append(f"| in the end | {' | '.join(_end(went[name]) for name in names)} |")
    return lines


def _cell(went: Chaos, kind: str) -> str:
    """Seconds to the next new step, steps that were done twice, and how many were told."""
    met = [o for o in went.outcomes if o.fault.kind == kind]
    found = [o for o in met if o.back_s]
    if not found:
        return "did not go on" if met else ""
    seconds = statistics.median(o.back_s for o in found)
    repeated = ", ".join(str(o.repeated) for o in found)
    told = sum(bool(o.told) for o in found)
    gone = "" if len(found) == len(met) else "; once did not go on"
    return f"{seconds:.1f} s; {repeated}; {told} of {len(found)}{gone}"


def _twice(went: Chaos) -> str:
    return str(len(went.run.steps) - len(went.run.curve))


def _end(went: Chaos) -> str:
    return "; ".join(went.wrong) or "the undisturbed curve"


def main() -> None:
    parser = argparse.ArgumentParser(description="The same faults of several trainings.")
    parser.add_argument("words", nargs="*", help="of contenders, such as DDP")
    parser.add_argument("--each", type=int, default=3, help="faults of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="all that the processes say")
    args = parser.parse_args()
    os.environ.setdefault("PIPECOMPILE_COSTS", "roofline")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and leave no process behind
    if not any("DeepSpeed" in name for name in chaos_rival.RIVALS):
        print("Without DeepSpeed, which is not installed: pip install -e '.[rivals]'\n")
    words = [word.lower() for word in args.words] or [""]
    names = [n for n in (OURS, *chaos_rival.RIVALS) if any(word in n.lower() for word in words)]
    faults = faults_of(args.seed, args.each, args.kinds)
    went: dict[str, Chaos] = {}
    for name in names:
        print(f"{name}:", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            commands = commands_of(name, Path(folder))
            went[name] = suffered(
                Path(folder), commands, MINUTES, faults, False, args.verbose, name == OURS
            )
    print("\n".join(rows(names, went)))


if __name__ == "__main__":
    main()
