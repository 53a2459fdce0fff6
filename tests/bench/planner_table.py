"""What the planner brings over simple strategies, on models of real size. Prints Markdown.

`make planner-table` runs it; names of models (gpt2, llama, bert, t5) as arguments choose among
them. No weights are made and nothing is trained: plans are those of `inspect --device h100
--precision bf16`, within the memory that the device's driver reports, or less of it, of which it
takes some for itself. Seconds are those of the partitioning problem, (m − 1) · slowest stage +
Σ stages, without the optimizer: at peak rates, by which is planned, and of the same divisions by
what kernels reach (`costs="calibrated"`). Bytes include AdamW's states, and are calibrated to the
programs of the planner's own division, as `inspect --compare` does.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own helpers

import torch
import transformers as hf
from pipecompile.compiler.calibration.tables import table_of
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.capture.capture import capture_training
from pipecompile.compiler.capture.skeleton import skeleton_of
from pipecompile.compiler.costs.hardware import H100, Device
from pipecompile.compiler.driver.assembly import assemble, forward_passes
from pipecompile.compiler.driver.record import Recorder
from pipecompile.compiler.driver.work import Settings
from pipecompile.compiler.ir.errors import MemoryBudgetError
from pipecompile.compiler.ir.locality import locality_of
from pipecompile.compiler.ir.precision import Precision
from pipecompile.compiler.ir.problem import Problem, Solution, fits, solution_of
from pipecompile.compiler.ir.zero import WHOLE
from pipecompile.compiler.memory.footprint import Footprint
from pipecompile.compiler.memory.optimizer_cost import (
    Factory,
    OptimizerMemory,
    on_cuda,
    optimizer_memory,
)
from pipecompile.compiler.memory.rank_memory import RankMemory
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.plan.decision import Decision
from pipecompile.compiler.planning import decide
from pipecompile.compiler.planning.planner import Planner
from pipecompile.compiler.report.compare import solution_in
from pipecompile.compiler.tensors.fakes import weightless
from pipecompile.compiler.units.pricing import repriced, roofline
from pipecompile.passes.graph.casts import settle_casts
from pipecompile.passes.partition import baselines
from support.llama3 import llama3
from torch import nn

HOST = torch.device("cpu")
ADAMW = partial(torch.optim.AdamW, lr=1e-3)
BF16 = Precision(compute=torch.bfloat16)
GIB = 2**30
LOOSE = H100.memory_bytes
REACHED = replace(H100, table=table_of("h100"))

STAGES = (4, 8)
PER_STAGE = 4  # microbatches
SHARES = (0.4, 0.1)  # budgets: between the peaks of full recomputation (0) and of none (1)
SWEPT = "bert", 8, (1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05)


# -- the models -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model and the shape of its microbatch."""

    name: str
    build: Callable[[], nn.Module]
    rows: int
    tokens: int


def _bert() -> nn.Module:
    config = hf.BertConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    )
    return hf.BertForMaskedLM(config)


def _t5() -> nn.Module:
    config = hf.T5Config(d_model=1024, d_ff=4096, num_layers=24, num_heads=16)
    config.decoder_start_token_id = 0
    return hf.T5ForConditionalGeneration(config)


def _gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config())


SUBJECTS = {
    "gpt2": Subject("GPT-2 small", _gpt2, 8, 1024),
    "llama": Subject("Llama-3-8B", partial(llama3, 4096, 14336, 32, 32), 1, 4096),
    "bert": Subject("BERT-large", _bert, 8, 512),
    "t5": Subject("T5-large", _t5, 8, 512),
}


# -- planning -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """What the planner decided for one budget.

    Attributes:
        problem: its bytes are made those of the programs of the decision.
        reached: the same in the seconds that kernels reach.
        peak_bytes: of the fullest stage, by these programs, with what its device takes.
        seconds: that planning took, attempts of the memory model included.
    """

    problem: Problem
    reached: Problem
    own: Solution
    decision: Decision
    peak_bytes: int
    seconds: float


def _on_a_gpu(factory: Factory, params: Mapping[str, torch.Tensor]) -> OptimizerMemory:
    return optimizer_memory(factory, on_cuda(params))


class Study:
    """A model, captured once and planned many times."""

    def __init__(self, subject: Subject):
        with weightless():
            model = subject.build()
            ids = torch.zeros(subject.rows, subject.tokens, dtype=torch.long)
            _, self.spec = flatten({"input_ids": ids, "labels": ids})
        skeleton = skeleton_of(model, HOST, BF16)
        rewrites = forward_passes(BF16, "cuda", (), [])
        captured = capture_training(skeleton, self.spec, None, HOST, rewrites, BF16.compute)
        self.graph = captured.graph
        settle_casts(self.graph, BF16.compute)
        self.locality = locality_of(self.graph)
        self.footprint = Footprint(skeleton.module, ADAMW, BF16, measure=_on_a_gpu)

    def plan(self, n_stages: int, remat: str, budget_bytes: float) -> Planned:
        """Raises MemoryBudgetError where the planner finds nothing that fits."""
        started = time.perf_counter()
        m = PER_STAGE * n_stages
        options = CompileOptions(
            n_stages=n_stages, microbatches=m, optimizer=ADAMW, remat=remat, precision=BF16
        )
        settings = Settings(
            options,
            WHOLE,
            self.footprint,
            m,
            self.spec.nbytes,
            "cuda",
            H100,
            budget_bytes,
            whole=True,
        )
        planner = self._planner(options, H100, budget_bytes)

        def draft(decision: Decision) -> Sequence[RankMemory]:
            placement, again = decide.apply(decision, self.graph, self.locality)
            work = self.graph, self.locality, placement.stage, again, decision, None, None
            return assemble(settings, *work, Recorder(None)).memory

        decision = planner.decide(draft, roofline(planner.bodies, planner.menus))
        seconds = time.perf_counter() - started
        memory = draft(decision)
        assert planner.solved is not None
        problem = _calibrated(planner.solved, decision, memory)
        prices = repriced(planner.bodies, planner.menus, REACHED)
        reached = self._planner(options, REACHED, budget_bytes, planner).problem(prices)
        own = solution_in(problem, decision)
        peak = max(s.needed_bytes for s in memory)
        return Planned(problem, reached, own, decision, peak, seconds)

    def _planner(
        self,
        options: CompileOptions,
        device: Device,
        budget_bytes: float,
        like: Planner | None = None,
    ) -> Planner:
        held = self.footprint.held_bytes(self.graph.copies)
        m, parts = options.microbatches, None if like is None else like.parts
        assert m is not None
        of = self.graph, self.locality, options, device, held, m
        return Planner(*of, self.spec.rows, budget_bytes, {}, parts)

    def scale(self, n_stages: int) -> tuple[int, int]:
        """Peaks of the best divisions that recompute everything, and nothing."""
        full, none = (self.plan(n_stages, remat, math.inf) for remat in ("full", "none"))
        return full.peak_bytes, none.peak_bytes


def _calibrated(problem: Problem, decision: Decision, memory: Sequence[RankMemory]) -> Problem:
    """With reserves that make the problem's bytes of a decision those of its programs."""
    priced = solution_in(problem, decision).ranks_bytes
    rows = zip(memory, problem.reserve_bytes, priced, strict=True)
    reserves = tuple(s.needed_bytes - (p - held) for s, held, p in rows)
    return replace(problem, reserve_bytes=reserves)


def _equal_full(problem: Problem) -> Solution:
    """Equal numbers of units, everything recomputed: what is done by hand when memory is short."""
    even = baselines.solve_uniform(problem)
    last = [len(each) - 1 for each in problem.options]
    return solution_of(problem, even.stage, last, "equal, full")


STRATEGIES: Mapping[str, Callable[[Problem], Solution]] = {
    "sequential": baselines.solve_sequential,
    "all-or-nothing": baselines.solve_all_or_nothing,
    "equal units": baselines.solve_uniform,
    "equal units, full remat": _equal_full,
    "equal parameters": baselines.solve_parameters,
}


# -- tables ---------------------------------------------------------------------------------------


def _head(first: Iterable[str]) -> list[str]:
    heads = [*first, "GiB", "slowest ms", "step s", "reached s", *STRATEGIES, "solver"]
    return [_line(heads), _line("---" for _ in heads)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _row(first: Iterable[str], study: Study, n_stages: int, budget_bytes: float) -> str:
    start = [*first, f"{budget_bytes / GIB:.2f}"]
    try:
        planned = study.plan(n_stages, "auto", budget_bytes)
    except MemoryBudgetError as error:
        text = " ".join(str(error).split()).partition(":")[0]
        return _line([*start, "", "", "", *("" for _ in STRATEGIES), f"nothing found: {text}"])
    own, search = planned.own, planned.decision.search
    others = [_versus(planned, find(planned.problem)) for find in STRATEGIES.values()]
    known = "proven" if search.proven else f"gap {search.gap:.2%}"
    solver = f"{known}, {search.solver}, {search.seconds:.2f} s of {planned.seconds:.1f} s"
    steps = f"{own.objective:.3f}", f"{_reached_s(planned, own):.3f}"
    return _line([*start, f"{max(own.stages_s) * 1e3:.1f}", *steps, *others, solver])


def _reached_s(planned: Planned, found: Solution) -> float:
    """The step of a division by what kernels reach."""
    return planned.reached.objective(planned.reached.stages_s(found.stage, found.option))


def _versus(planned: Planned, found: Solution) -> str:
    """Slowest stage, step and reached step as multiples of the plan's; † does not fit."""
    own = planned.own
    ratios = (
        max(found.stages_s) / max(own.stages_s),
        found.objective / own.objective,
        _reached_s(planned, found) / _reached_s(planned, own),
    )
    return " / ".join(f"{ratio:.2f}" for ratio in ratios) + (
        "" if fits(planned.problem, found) else " †"
    )


def main(names: Sequence[str]) -> None:
    started = time.perf_counter()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tables: dict[str, list[str]] = {
        title: _head(("model", "stages"))
        for title in ("All of the device", *(f"Budget at {share:.0%}" for share in SHARES))
    }
    loose, *tight = tables.values()
    swept = []
    for name in names:
        subject = SUBJECTS[name]
        study = Study(subject)
        for n_stages in STAGES:
            full, none = study.scale(n_stages)
            first = subject.name, str(n_stages)
            loose.append(_row(first, study, n_stages, LOOSE))
            for share, table in zip(SHARES, tight, strict=True):
                table.append(_row(first, study, n_stages, full + share * (none - full)))
            if (name, n_stages) == SWEPT[:2]:
                title = f"{subject.name}, {n_stages} stages, other budgets"
                swept = [f"\n{title}\n", *_head(["share"])]
                for share in SWEPT[2]:
                    budget = full + share * (none - full)
                    swept.append(_row([f"{share:.0%}"], study, n_stages, budget))
    for title, lines in tables.items():
        print(f"\n{title}\n", *lines, sep="\n")
    print(*swept, sep="\n")
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main(sys.argv[1:] or list(SUBJECTS))
