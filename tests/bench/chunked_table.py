"""What chunked_loss= brings on models of real size. Prints Markdown.

`make chunked-table` runs it, for about eight minutes; cases such as 8b:4096:bf16:4,8:0.8 (model,
tokens of a microbatch, precision, numbers of stages, budget as a share of what whole logits need
where nothing is recomputed) as arguments choose others. No weights are made and nothing is
trained: bytes are those of the programs, steps those of the simulator at an H100's peak rates,
AdamW's step included; four microbatches per stage.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers

import torch
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.costs.hardware import H100
from pipecompile.compiler.driver.builder import Builder
from pipecompile.compiler.driver.capturing import Shared
from pipecompile.compiler.driver.compiled import Mode
from pipecompile.compiler.ir.errors import MemoryBudgetError
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.plan.plan import Plan
from pipecompile.compiler.planning.target import Target
from pipecompile.compiler.tensors.fakes import weightless
from support.llama3 import llama3

HOST = torch.device("cpu")
GIB = 2**30
PER_STAGE = 4  # microbatches
ADAMW = partial(torch.optim.AdamW, lr=1e-3)
SHAPES = {
    "1b": ("Llama-3.2-1B", 2048, 8192, 16, 32),
    "8b": ("Llama-3-8B", 4096, 14336, 32, 32),
    "70b": ("Llama-3-70B", 8192, 28672, 80, 64),
}
CASES = ("8b:4096:bf16:4,8:0.8", "70b:4096:bf16:4,8:0.6")
ROWS = 256


class Planned:
    """Plans of one model in one precision, which are traced once."""

    def __init__(self, name: str, tokens: int, precision: str):
        _, hidden, inner, layers, heads = SHAPES[name]
        self.precision = precision
        options = CompileOptions(n_stages=1, precision=precision)
        with weightless():
            model = llama3(hidden, inner, layers, heads, tokens, tied=name == "1b")
            ids = torch.zeros(1, tokens, dtype=torch.long)
            _, self.spec = flatten({"input_ids": ids, "labels": ids})
            self.skeleton = skeleton_of(model, HOST, options.dtypes)
        self.captured = Shared()

    def plan(self, stages: int, budget: float = float("inf"), **more: object) -> Plan:
        m = PER_STAGE * stages
        given = {"n_stages": stages, "microbatches": m, "optimizer": ADAMW, **more}
        options = CompileOptions(precision=self.precision, **given)  # type: ignore[arg-type]
        target = Target(HOST, H100, budget)
        builder = Builder(self.skeleton, options, target, captured=self.captured)
        return builder.build(Mode.TRAIN, self.spec, m).plan


def fullest(plan: Plan) -> int:
    return max(stage.memory.peak for stage in plan.stages)


def line_of(case: str, planned: Planned, stages: int, share: float) -> str:
    """Without a budget; and with one that is too small for whole logits without more ado."""
    whole, pieces = (planned.plan(stages, chunked_loss=loss) for loss in ("off", ROWS))
    budget = share * fullest(whole)
    cells = [
        *(f"{p.stages[-1].memory.peak / GIB:.1f}" for p in (whole, pieces)),
        *(f"{fullest(p) / GIB:.1f}" for p in (whole, pieces)),
        *(f"{p.step_s:.3f}" for p in (whole, pieces)),
        f"{budget / GIB:.1f}",
    ]
    try:
        auto = planned.plan(stages, budget, chunked_loss="auto")
    except MemoryBudgetError:
        return f"| {case} | {stages} | {' | '.join([*cells, '–', '–'])} |"
    other = re.search(r"; whole: a step of ([0-9.]+) s", dict(auto.notes)["chunked_loss"])
    chosen = "pieces" if auto.decision.chunk_rows else "whole"
    off = f"{float(other[1]):.3f}" if other else "–"
    return f"| {case} | {stages} | {' | '.join([*cells, off])} | {auto.step_s:.3f}, {chosen} |"


HEAD = (
    "| model, tokens, precision | stages | last stage, GiB: whole | pieces | fullest, GiB: whole "
    "| pieces | step, s: whole | pieces | budget, GiB | step in it, s: whole | auto |"
)


def main() -> None:
    print(HEAD)
    print(f"| --- {'| ---: ' * (HEAD.count('|') - 2)}|", flush=True)
    for each in sys.argv[1:] or CASES:
        name, tokens, precision, stages, share = each.split(":")
        planned = Planned(name, int(tokens), precision)
        case = f"{SHAPES[name][0]}, {tokens}, {precision}"
        for count in map(int, stages.split(",")):
            print(line_of(case, planned, count, float(share)), flush=True)


if __name__ == "__main__":
    main()
