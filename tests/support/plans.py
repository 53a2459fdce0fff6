"""A plan with round numbers and everything in it that a plan can have."""

from __future__ import annotations

from pipecompile.compiler.driver.auto import Trial, Way
from pipecompile.compiler.ir.actions import Action, Kind
from pipecompile.compiler.plan.decision import Decision, Search
from pipecompile.compiler.plan.plan import MemoryPlan, Plan, StagePlan, TiedPlan, Transfer
from pipecompile.compiler.report.compare import Comparison
from pipecompile.compiler.report.report import Extras
from pipecompile.passes.schedule.simulate import Interval, Timeline


def hand_made() -> tuple[Plan, Timeline]:
    """Two stages, 30 microbatches, every section of a report, round numbers."""
    sends = (Transfer(1, "forward", 2**21, tuple(f"value_{i}" for i in range(6))),)
    stages = tuple(
        StagePlan(
            stage=s,
            rank=s,
            modules=("embed", "blocks.0–3") if s == 0 else ("head",),
            units=4,
            params=(),
            param_count=3_000_000 * (s + 1),
            param_bytes=12_000_000 * (s + 1),
            forward_flops=2 * 10**12,
            backward_flops=4 * 10**12,
            recompute_flops=10**12 if s == 0 else 0,
            forward_s=0.5,
            backward_s=0.875 if s == 0 else 1.0,
            recompute_s=0.125 if s == 0 else 0.0,
            closing_s=0.25 * s,
            recomputes={"attention": 2, "norm, elementwise": 1} if s == 0 else {},
            stash_bytes=10 * 2**20,
            carry_bytes=0,
            in_flight=2 - s,
            memory=MemoryPlan(
                weights=2**30,
                copies=0,
                grads=2**30,
                states=2**31,
                buffers=2**20,
                constants=2**20,
                batch=0,
                peak=(6 - s) * 2**30,
                peak_at=f"{s}B3",
            ),
            sends=sends if s == 0 else (),
        )
        for s in range(2)
    )
    rows = tuple(
        tuple(
            Interval(Action(s, kind, i), start, end)
            for i in range(30)
            for kind, start, end in (
                (Kind.F, 1.5 * i + s / 2, 1.5 * i + 0.5 + s / 2),
                (Kind.B, 1.5 * i + 0.5 + s / 2, 1.5 * i + 1.5 + s / 2),
            )
        )
        for s in range(2)
    )
    timeline = Timeline(rows, (0.0, 0.25))
    plan = Plan(
        model="Hand[made]",
        n_stages=2,
        virtual_stages=1,
        dp=1,
        microbatches=30,
        microbatch_rows=2,
        shape="x: float32[2, 16]",
        microbatch_tokens=0,
        device="cpu",
        costs="profile",
        budget_bytes=2**33,
        param_count=8_999_999,
        options={"schedule": "1f1b", "tied_grads": "per_step"},
        decision=Decision(
            fingerprint="",
            unit_nodes=(1,) * 8,
            unit_stage=(0,) * 4 + (1,) * 4,
            unit_recomputes=("attention", "attention", "norm, elementwise") + ("nothing",) * 5,
            unit_seconds=((0.125, 0.25, 0.0),) * 8,
            recomputed=(),
            search=Search(45.5, 44.0, False, "highs", "time limit of 30 s reached"),
        ),
        stages=stages,
        tied=(
            TiedPlan(
                "embed.weight", ("embed.weight", "head.weight"), (0, 1), 0, 99, 99, "per_step"
            ),
        ),
        schedule=(),
        step_s=timeline.step_s,
        bubble=timeline.bubble,
        notes=(("capture", "7 operators"),),
    )
    return plan, timeline


EXTRAS = Extras(
    search_s=30.125,
    trials=(
        Trial(
            Way(1, 2, "1f1b"), None, None, "stage 0 needs 9.00 GiB of 8.00 GiB, 1.00 GiB too much"
        ),
        Trial(Way(2, 1, "1f1b"), 4, 45.25),
    ),
    comparison=(
        Comparison("this plan", (4, 4), 1.5, 45.5, 1.0, 6 * 2**30, 0),
        Comparison("uniform", (3, 5), 2.0, 60.0, 60 / 45.5, 9 * 2**30, 1, 2**30),
        Comparison("parameters", reason="blocks.0 is pinned to stage 1"),
    ),
    hints=("--microbatches 60: twice as many",),
)
