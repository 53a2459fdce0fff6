"""Faults at random moments of a training under torchrun, and what they cost.

python tests/bench/chaos.py --minutes 5 --seed 0     # or --faults 200
python tests/bench/chaos.py --network                # machines with cables that are cut; needs root
python tests/bench/chaos.py --skip 60 --faults 8     # some of them again
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support import chaos, hosts
from support.chaos import TIMEOUT_S, Chaos, Fault, compared, drawn, endured, summary
from support.elastic import NetworkRun, Run, script_of

RANKS = 2


def main() -> int:
    parser = argparse.ArgumentParser(description="Random faults of a real run.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--faults", type=int, default=10_000, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0, help="so many of the first")
    parser.add_argument("--network", action="store_true", help="between namespaces, as root")
    parser.add_argument("--verbose", action="store_true", help="all that the processes say")
    args = parser.parse_args()
    os.environ.setdefault("PIPECOMPILE_COSTS", "roofline")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and leave no process behind
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        often = chaos.OF_NETWORKS if args.network else chaos.KINDS
        every = drawn(args.seed, RANKS, often)
        faults = list(itertools.islice(every, args.skip, args.skip + args.faults))
        return endure(folder, ours(folder), args.minutes, faults, args.network, args.verbose)


def ours(folder: Path) -> tuple[list[str], list[str]]:
    """The command of a run that saves, and of one that does not."""
    session = {"directory": str(folder / "checkpoints"), "save_every": 7, "keep": 3}
    commands = [script_of(folder), str(10**6), f"({RANKS}, {RANKS})"]
    options = {"timeout_s": TIMEOUT_S}
    return [*commands, repr({"session": session, **options})], [*commands, repr(options)]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def endure(
    folder: Path,
    commands: tuple[list[str], list[str]],
    minutes: float,
    faults: list[Fault],
    network: bool = False,
    verbose: bool = False,
) -> int:
    """`suffered`; 0 if all is as it ought to be. The figures are printed."""
    went = suffered(folder, commands, minutes, faults, network, verbose)
    print(json.dumps(summary(went), indent=2))
    return 1 if went.wrong else 0


def suffered(
    folder: Path,
    commands: tuple[list[str], list[str]],
    minutes: float,
    faults: list[Fault],
    network: bool = False,
    verbose: bool = False,
    names: bool = True,
) -> Chaos:
    """A run with faults, and then one without, whose curve has to be the same.

    Args:
        commands: of the one, and of the other.
        network: whether the one is of machines with networks of their own.
        names: as `Chaos` has it.
    """
    end, directory = folder / "end", folder / "checkpoints"
    environment = {"END": str(end), "PIPECOMPILE_CACHE": str(folder / "cache")}
    more = {"fewest": RANKS, "restarts": 10**6, "environment": environment}
    with contextlib.ExitStack() as stack:
        if network:
            more["network"] = stack.enter_context(hosts.network(RANKS))
        kind = NetworkRun if network else Run
        run = stack.enter_context(kind(commands[0], folder, RANKS, **more))  # type: ignore[arg-type]
        try:
            went = endured(run, directory, end, faults, minutes, tell, names)
        finally:
            if verbose:
                print("\n".join(run.said), file=sys.stderr)
        curve = run.curve
    if not went.ended:  # as far as it came
        end.write_text(str(max(curve, default=0) + 1))
    more.pop("network", None)
    with Run(commands[1], folder, RANKS, **more) as undisturbed:  # type: ignore[arg-type]
        undisturbed.finished(60 + len(curve))
        went.wrong += compared(curve, undisturbed.curve)
    return went


if __name__ == "__main__":
    sys.exit(main())
