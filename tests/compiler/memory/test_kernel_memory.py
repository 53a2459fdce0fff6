"""Bytes of fusions: by hand, and beside what Inductor's kernels allocate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pipecompile
import pytest
import torch
from bench import models
from pipecompile.compiler.ir.program import BoxedCodeGen, Role
from pipecompile.compiler.memory.kernels import ARGUMENT, MADE, launches_of
from pipecompile.compiler.memory.program_memory import effect_of
from pipecompile.compiler.plan.plan import Plan
from pipecompile.passes.programs.fusions import fused_stage
from pipecompile.runtime.kernels import inductor
from support import fused, jobs, measured, units
from support import models as small
from support.gang import Gang
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

APART = 0.03
A, B = 1000, 3000  # bytes of 10 x 25 and 10 x 75 floats

_ATEN = torch.ops.aten
compiling = pytest.mark.skipif(bool(inductor.lacking("cpu")), reason="no C++ compiler")


def fusion(function: Callable[..., Any], *shapes: tuple[int, ...]) -> fx.GraphModule:
    """A function over tensors as `programs.fusions` makes one."""
    module = make_fx(function, tracing_mode="fake")(*(torch.ones(shape) for shape in shapes))
    (output,) = module.graph.find_nodes(op="output")
    made = output.args[0]
    output.args = (tuple(made) if isinstance(made, list) else (made,),)
    module.graph.set_codegen(BoxedCodeGen())
    return fx.GraphModule(module, module.graph)


def peak(module: fx.GraphModule) -> int:
    """The most that its kernels hold beside arguments that others hold too."""
    launches = launches_of(module)
    live = most = 0
    for step in launches.steps:
        live += sum(launches.sizes[number] for number in step.makes)
        most = max(most, live)
        live -= sum(launches.sizes[number] for kind, number in step.frees if kind == MADE)
    return most


# -- by hand --------------------------------------------------------------------------------------


def chain(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).tanh().exp() + 1


def mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return torch.mm(functional.gelu(torch.mm(x, up)) * 2, down)


def read_twice(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> list[torch.Tensor]:
    wide = torch.mm(x, up)
    return [torch.mm(wide.exp(), down), wide]


def sums(x: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, up).exp().sum(0)


def two_of_one(x: torch.Tensor, up: torch.Tensor) -> list[torch.Tensor]:
    wide = torch.mm(x, up)
    return [wide.exp(), wide.tanh()]


def again(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The second wide product takes the memory of the first."""
    narrow = torch.mm(torch.mm(x, up), down)
    return torch.mm(torch.mm(narrow, up), down)


@pytest.mark.parametrize(
    ("function", "shapes", "most", "kernels"),
    [
        (chain, [(10, 25)], A, 1),  # all in registers but the result
        (mlp, [(10, 25), (25, 75), (75, 25)], B + A, 3),  # gelu over what the first product wrote
        (read_twice, [(10, 25), (25, 75), (75, 25)], 2 * B + A, 3),
        (sums, [(10, 25), (25, 75)], B + 300, 2),
        (two_of_one, [(10, 25), (25, 75)], 3 * B, 2),  # both read it until the end
        (again, [(10, 25), (25, 75), (75, 25)], B + A, 4),
    ],
)
def test_kernels_hold_what_was_counted(
    function: Callable[..., Any], shapes: list[tuple[int, ...]], most: int, kernels: int
) -> None:
    module = fusion(function, *shapes)
    assert (peak(module), len(launches_of(module).steps)) == (most, kernels)


def test_a_loss_has_its_gradient_and_what_is_scattered_into_it() -> None:
    """Beside the log probabilities, which are an argument."""

    def backward(grad: torch.Tensor, logs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total = torch.ones(())
        part = _ATEN.nll_loss_backward(grad, logs, labels.long(), None, 1, -100, total)
        return _ATEN._log_softmax_backward_data(part, logs, 1, torch.float32)

    assert peak(fusion(backward, (), (10, 25), (10,))) == pytest.approx(2 * A, abs=100)


def test_arguments_go_after_the_last_kernel_that_reads_them() -> None:
    launches = launches_of(fusion(mlp, (10, 25), (25, 75), (75, 25)))
    freed = [{n for kind, n in step.frees if kind == ARGUMENT} for step in launches.steps]
    assert freed == [{0, 1}, set(), {2}]
    assert launches.stays == launches.results  # and nothing else is left


# -- programs -------------------------------------------------------------------------------------


def test_a_backward_frees_its_stash_within_fusions() -> None:
    """Of one layer, whose backward is one fusion: kernel by kernel, and not after the call."""
    graph = units.captured(small.build("gpt2"), small.batches("gpt2", 8, 1)[0])
    (eager,) = units.programs(graph, whole=True)
    stage = fused_stage(eager, {})
    assert stage.backward is not None
    assert all(map(fused.calls, stage.parts.values()))
    made = effect_of(stage.forward, (), {}, {})
    stash = {name: block for name, block in made.made.items() if block is not None}
    sizes = {name: made.sizes[block] for name, block in stash.items()}
    given = {str(p.key): None for p in stage.backward.inputs if p.role is Role.VALUE}
    given |= {name: name for name in stash if name in given}
    freed = effect_of(stage.backward, list(given), given, sizes).extra_bytes
    held = effect_of(stage.backward, (), given, sizes).extra_bytes
    assert freed < held <= freed + sum(sizes.values())


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_plans_whose_gradients_leave_with_every_microbatch_know_products_too(zero: int) -> None:
    batch = small.tokens(16, 16)
    with fused.interpreted():
        peaks = [
            jobs.pipeline("gpt2", 1, 2, 4, example_batch=batch, zero=zero, backend=backend)
            .plan.stages[0]
            .memory.peak
            for backend in ("inductor", "eager")
        ]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.3)


# -- beside what kernels allocate -----------------------------------------------------------------


@compiling
@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", models.MODELS)
def test_peaks_of_compiled_steps_come_true(name: str, remat: str) -> None:
    batch = models.batch(16)
    pipe = compiled(name, batch, remat=remat)
    (stage,) = pipe.plan.stages
    assert measured.allocated_peak(pipe, batch) == pytest.approx(stage.memory.peak, rel=APART)


def compiled(name: str, batch: dict[str, torch.Tensor], **options: Any) -> Any:
    """A pipeline of one stage that has taken two steps."""
    options |= {"optimizer": partial(torch.optim.AdamW, lr=3e-4), "example_batch": batch}
    pipe = pipecompile.compile(models.build(name), 1, microbatches=4, backend="inductor", **options)
    for _ in range(2):  # kernels keep what they make at first
        pipe.step(batch)
    return pipe


@compiling
@pytest.mark.slow
def test_a_budget_between_none_and_full_is_kept() -> None:
    batch = models.batch(16)

    def planned(**options: Any) -> Plan:
        made = partial(torch.optim.AdamW, lr=3e-4)
        how = {"optimizer": made, "example_batch": batch, "backend": "inductor", **options}
        plan: Plan = pipecompile.compile(models.build("llama"), 1, microbatches=4, **how).plan
        return plan

    least, most = (planned(remat=way).stages[0].memory.peak for way in ("full", "none"))
    budget = (least + most) // 2
    pipe = compiled("llama", batch, memory=budget)
    assert least < pipe.plan.stages[0].memory.peak <= budget
    assert measured.allocated_peak(pipe, batch) <= budget * (1 + APART)


@compiling
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_stages_of_processes_come_true(gang: Callable[[int], Gang], name: str) -> None:
    """The first has no logits, so that its layers count; its last message is on its way."""
    for found, planned, message in gang(2).run(measured.compiled_peaks, name):
        assert planned * (1 - APART) - message <= found <= planned * (1 + APART) + message
