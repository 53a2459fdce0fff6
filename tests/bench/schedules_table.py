"""What schedules and several stages per rank bring, on models of real size. Prints Markdown.

`make schedules-table` runs it; names of models (gpt2, llama, 405b) as arguments choose among them.
No weights are made and nothing is trained: steps are those of the simulator at an H100's peak rates
in bf16, AdamW's step included, as `inspect --compare schedules --device h100` shows them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers

import torch
import transformers as hf
from pipecompile.compiler.capture.batch import BatchSpec, flatten
from pipecompile.compiler.capture.skeleton import Skeleton, skeleton_of
from pipecompile.compiler.costs.hardware import H100
from pipecompile.compiler.driver.auto import Open, Trial, Way, choose
from pipecompile.compiler.driver.builder import Builder
from pipecompile.compiler.driver.capturing import Shared
from pipecompile.compiler.driver.compiled import Compiled, Mode
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.planning.target import Target
from pipecompile.compiler.tensors.fakes import weightless
from support.llama3 import llama3
from torch import nn

HOST = torch.device("cpu")
GIB = 2**30


@dataclass(frozen=True)
class Subject:
    """A model, the shape of its microbatch, and the settings that it is planned for.

    Attributes:
        ranks: of the pipeline.
        rounds: microbatches per rank.
    """

    name: str
    build: Callable[[], nn.Module]
    rows: int
    tokens: int
    ranks: tuple[int, ...]
    rounds: tuple[int, ...] = (2, 4)


SUBJECTS = {
    "gpt2": Subject("GPT-2 small", lambda: hf.GPT2LMHeadModel(hf.GPT2Config()), 8, 1024, (4, 8)),
    "llama": Subject("Llama-3-8B", lambda: llama3(4096, 14336, 32, 32), 1, 4096, (8, 16)),
    "405b": Subject("Llama-3-405B", lambda: llama3(16384, 53248, 126, 128), 1, 4096, (8, 16)),
}


def trials_of(
    subject: Subject, skeleton: Skeleton, spec: BatchSpec, captured: Shared, ranks: int, m: int
) -> tuple[Trial, ...]:
    """Every schedule on so many ranks, with so many microbatches."""
    options = CompileOptions(
        n_stages=ranks, microbatches=m, optimizer=torch.optim.AdamW, precision="bf16"
    )
    target = Target(HOST, H100)

    def build(way: Way, finer: int) -> Compiled:
        builder = Builder(skeleton, way.of(options), target, captured=captured)
        return builder.build(Mode.TRAIN, spec, m)

    return choose(Open(divides=False, orders=True).ways(options, ranks), build)[1]


def lines_of(subject: Subject) -> Iterator[str]:
    with weightless():
        model = subject.build()
        ids = torch.zeros(subject.rows, subject.tokens, dtype=torch.long)
        _, spec = flatten({"input_ids": ids, "labels": ids})
    options = CompileOptions(n_stages=1, precision="bf16")
    skeleton = skeleton_of(model, HOST, options.dtypes)
    captured = Shared()
    settings = [(ranks, rounds * ranks) for ranks in subject.ranks for rounds in subject.rounds]
    for number, (ranks, m) in enumerate(settings):
        trials = trials_of(subject, skeleton, replace(spec), captured, ranks, m)
        if number == 0:
            yield from _head(subject.name, trials)
        yield from _rows(f"{ranks} ranks, m = {m}", trials)


def _head(name: str, trials: tuple[Trial, ...]) -> Iterator[str]:
    """The schedules, with the number of stages per rank where it is not 1."""
    names = [f"{t.way.schedule} {t.way.virtual_stages or ''}".strip() for t in trials]
    yield f"\n| {name} | | {' | '.join(names)} |"
    yield f"| --- | --- |{' ---: |' * len(names)}"


def _rows(name: str, trials: tuple[Trial, ...]) -> Iterator[str]:
    """Of one setting: how much faster than 1f1b, with the bubble; and the peaks."""
    usual_s = next(t.step_s for t in trials if t.way.schedule == "1f1b") or 1.0
    best = min(t.step_s for t in trials if t.step_s)
    faster, peaks = [], []
    for trial in trials:
        if trial.step_s is None:
            faster.append("–")
            peaks.append("–")
            continue
        mark = "**" if trial.step_s == best else ""
        usual = trial.way.schedule == "1f1b"
        took = f"{usual_s:.3g} s" if usual else f"{mark}{usual_s / trial.step_s:.2f} ×{mark}"
        faster.append(f"{took}, {trial.bubble:.0%}")
        peaks.append(f"{trial.peak_bytes / GIB:.4g}")
    yield f"| {name} | step, bubble | {' | '.join(faster)} |"
    yield f"| | peak, GiB | {' | '.join(peaks)} |"


def main(names: list[str]) -> None:
    for name in names or SUBJECTS:
        for line in lines_of(SUBJECTS[name]):
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
