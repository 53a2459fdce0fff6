"""What tight budgets leave on the table: the plan's simulated step against the best there is found.

`make tight-table` runs it; numbers of cases as arguments choose among them. Small models at an
H100's peak rates, in budgets from nearly full recomputation (0 %) to nearly none (100 %). The best
is found by brute force: the problem is solved with every reserve from far too small to what the
plan had, each division is polished by the local search and kept if its programs fit.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import transformers as hf
from pipecompile.compiler.costs.hardware import H100
from pipecompile.compiler.driver.assembly import assemble
from pipecompile.compiler.driver.record import Recorder
from pipecompile.compiler.driver.work import Settings
from pipecompile.compiler.ir.errors import MemoryBudgetError
from pipecompile.compiler.ir.problem import Solution
from pipecompile.compiler.ir.zero import WHOLE
from pipecompile.compiler.memory.rank_memory import RankMemory
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.plan.decision import Decision
from pipecompile.compiler.planning import decide
from pipecompile.compiler.planning.planner import Planner
from pipecompile.compiler.planning.refine import StepModel, refine
from pipecompile.compiler.report.compare import solution_in
from pipecompile.compiler.units.pricing import roofline
from pipecompile.compiler.units.weights import weight_works
from pipecompile.passes.partition.solve import solve
from planner_table import ADAMW, BF16, PER_STAGE, Study, Subject

LESS = (0.0, 0.002, 0.004, 0.006, 0.01, 0.015, 0.02, 0.03, 0.05)  # of the budget
SHARES = (0.05, 0.15, 0.3, 0.5)
SCHEDULES = ("1f1b", "zb_h1")
STAGES = 4


def _gpt2() -> hf.PreTrainedModel:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=10, n_embd=512, n_head=8, vocab_size=8192))


def _llama() -> hf.PreTrainedModel:
    config = hf.LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        vocab_size=8192,
        use_cache=False,
    )
    return hf.LlamaForCausalLM(config)


SUBJECTS = (Subject("gpt2, 10 layers", _gpt2, 8, 512), Subject("llama, 10 layers", _llama, 8, 512))


@dataclass(frozen=True)
class Case:
    """A planner, what its decisions need, and how long their steps take."""

    planner: Planner
    draft: Callable[[Decision], Sequence[RankMemory]]
    model: StepModel

    def decided(self) -> Solution:
        decision = self.planner.decide(self.draft, self.model.prices)
        return solution_in(self.model.problem, decision)

    def fits(self, solution: Solution) -> bool:
        planner = self.planner
        made = decide.decision_of(
            planner.fingerprint, planner.units, planner.menus, self.model.prices, solution
        )
        pairs = zip(self.draft(made), planner.budgets, strict=True)
        return all(rank.peak_bytes <= budget for rank, budget in pairs)

    def step_s(self, solution: Solution) -> float:
        return self.model.searched_s(solution.stage, solution.option)

    def best(self, start: Solution) -> float:
        """By brute force, from what the planner had."""
        steps = [self.step_s(start)]
        solved = self.planner.solved
        assert solved is not None
        for part in LESS:
            pairs = zip(solved.reserve_bytes, self.planner.budgets, strict=True)
            problem = replace(solved, reserve_bytes=tuple(r - part * b for r, b in pairs))
            try:
                found = solve(problem)
            except MemoryBudgetError:
                continue
            refined, _ = refine(replace(self.model, problem=problem), found)
            steps += [self.step_s(x) for x in (found, refined) if self.fits(x)]
        return min(steps)


def case(study: Study, schedule: str, budget_bytes: float, remat: str = "auto") -> Case:
    m = PER_STAGE * STAGES
    options = CompileOptions(
        n_stages=STAGES,
        microbatches=m,
        optimizer=ADAMW,
        remat=remat,
        precision=BF16,
        schedule=schedule,
    )
    settings = Settings(options, WHOLE, study.footprint, m, study.spec.nbytes, "cuda", H100)
    held = study.footprint.held_bytes(study.graph.copies)
    graph, locality = study.graph, study.locality
    planner = Planner(graph, locality, options, H100, held, m, study.spec.rows, budget_bytes, {})

    def draft(decision: Decision) -> Sequence[RankMemory]:
        placement, again = decide.apply(decision, graph, locality)
        work = graph, locality, placement.stage, again, decision, None, None
        return assemble(replace(settings, drafts=True), *work, Recorder(None)).memory

    prices = roofline(planner.bodies, planner.menus)
    shape = options.shape(m)
    model = StepModel(
        planner.problem(prices),
        options.kind,
        replace(shape, splits=(False, *shape.splits[1:])),
        prices,
        weight_works(planner.bodies, planner.places, H100),
        H100,
    )
    return Case(planner, draft, model)


def cases() -> Iterator[tuple[str, Case]]:
    for subject in SUBJECTS:
        study = Study(subject)
        for schedule in SCHEDULES:
            peaks = []
            for remat in ("full", "none"):
                whole = case(study, schedule, math.inf, remat)
                made = whole.planner.decide(whole.draft, whole.model.prices)
                peaks.append(max(rank.peak_bytes for rank in whole.draft(made)))
            for share in SHARES:
                budget = peaks[0] + share * (peaks[1] - peaks[0])
                yield f"{subject.name}, {schedule}, {share:.0%}", case(study, schedule, budget)


def main(chosen: Sequence[int]) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print("| case | step, ms | best found, ms | left |", "| --- | ---: | ---: | ---: |", sep="\n")
    for number, (name, one) in enumerate(cases()):
        if chosen and number not in chosen:
            continue
        try:
            solution = one.decided()
        except MemoryBudgetError:
            print(f"| {name} | nothing found | | |", flush=True)
            continue
        own, best = one.step_s(solution), one.best(solution)
        left = own / best - 1
        print(f"| {name} | {own * 1e3:.3f} | {best * 1e3:.3f} | {left:.2%} |", flush=True)


if __name__ == "__main__":
    main([int(number) for number in sys.argv[1:]])
