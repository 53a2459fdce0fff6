"""Sizes that small models never reach: every limit is made small, and exceeded.

Limits are read through the module that has them, so that there is one place to change them.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pipecompile
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.costs.hardware import H100
from pipecompile.compiler.driver.auto import Open, Way, choose
from pipecompile.compiler.ir import ops, precision, shards
from pipecompile.compiler.ir.actions import from_text
from pipecompile.compiler.ir.errors import MemoryBudgetError, PartitionError
from pipecompile.compiler.ir.locality import locality_of
from pipecompile.compiler.ir.precision import LossScale
from pipecompile.compiler.ir.problem import Option, Problem, solution_of
from pipecompile.compiler.ir.program import PipelineProgram, Program, StageProgram
from pipecompile.compiler.memory import rank_memory
from pipecompile.compiler.options.options import CompileOptions
from pipecompile.compiler.planning import advice
from pipecompile.compiler.profiling import profile, synthetic
from pipecompile.compiler.profiling.synthetic import Synthesizer
from pipecompile.compiler.tensors import norms
from pipecompile.compiler.units import cutter, stash
from pipecompile.compiler.units import menus as menus_
from pipecompile.compiler.units.units import units_of
from pipecompile.runtime import session
from pipecompile.runtime.state.accumulation import powers
from pipecompile.runtime.stepping.loss_scaler import LossScaler
from pipecompile.runtime.transport.mesh import connect, make_mesh
from pipecompile.runtime.transport.processes import Processes
from pipecompile.runtime.transport.transport import Endpoint
from pipecompile.runtime.weights import initializers
from pipecompile.runtime.weights.allocation import Allocation
from support import jobs, models, units
from support.gang import Gang
from torch import fx, nn

PACKAGE = Path(pipecompile.__file__).parent
CPU = torch.device("cpu")


def test_limits_are_read_through_their_modules() -> None:
    """A number that is imported by its name cannot be patched where it is. The alignment is no
    limit: it says where gradients start, to who plans and to who makes them."""
    found = []
    for folder in ("compiler", "passes", "runtime"):
        for path in (PACKAGE / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level and node.module:
                    file = path.parents[node.level - 1].joinpath(*node.module.split("."))
                    numbers = numbers_of(file.with_suffix(".py"))
                    found += [f"{path}: {a.name}" for a in node.names if a.name in numbers]
    assert [text for text in found if not text.endswith("ALIGNMENT_BYTES")] == []


@cache
def numbers_of(path: Path) -> set[str]:
    """The whole numbers that a file gives a name."""
    if not path.is_file():
        return set()
    tree = ast.parse(path.read_text())
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    return {
        target.id
        for node in assigned
        for target in node.targets
        if isinstance(target, ast.Name) and isinstance(_value(node.value), int)
    }


def _value(node: ast.expr) -> object:
    """A literal, or the first one of an expression such as ``64 << 20``."""
    while isinstance(node, ast.BinOp):
        node = node.left
    return node.value if isinstance(node, ast.Constant) else None


# -- what replicas exchange -----------------------------------------------------------------------


def means(counts: Sequence[int], segment_bytes: int) -> list[torch.Tensor]:
    """The mean over two processes of buckets of so many elements."""
    mesh = make_mesh(1, 2)
    connect(mesh, CPU)
    transport = Processes(mesh, CPU)
    assert mesh.rank is not None
    here = Endpoint(mesh.rank, mesh, CPU, transport)
    buckets = [bucket(count, here.replica) for count in counts]
    with mock.patch.object(rank_memory, "SEGMENT_BYTES", segment_bytes):
        for each in buckets:
            here.mean(each).wait()
    return buckets


def bucket(count: int, replica: int) -> torch.Tensor:
    return torch.arange(1.0, 1 + count) * 10**replica


def test_the_mean_is_taken_of_every_segment(gang: Callable[[int], Gang]) -> None:
    """Segments of 8 elements: one, exactly one, several, and several with a shorter last one."""
    counts = (4, 8, 32, 38)
    for found in gang(2).run(means, counts, 32):
        for count, mean in zip(counts, found, strict=True):
            assert torch.equal(mean, (bucket(count, 0) + bucket(count, 1)) / 2)


def test_the_plan_counts_a_segment_and_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Program(fx.GraphModule(nn.Module(), _returning()), (), ())
    stage = StageProgram(0, nothing, nothing, nothing, None, (), (), ())
    program = PipelineProgram((stage,), (), (), 0, None)
    actions = from_text("0F0 0B0 0REDUCE_GRAD")[0]
    static = rank_memory.Static(5000, 0, 1000, 0, 0, 0, 0)
    for segment, extra in ((400, 400 + 100), (4000, 1000 + 250)):
        monkeypatch.setattr(rank_memory, "SEGMENT_BYTES", segment)
        found = rank_memory.rank_memory(program, actions, static, dp=4)
        assert (found.peak_bytes, found.peak_at) == (6000 + extra, "0REDUCE_GRAD")


def _returning() -> fx.Graph:
    graph = fx.Graph()
    graph.output(())
    return graph


SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=8)


@given(SHAPES, st.integers(1, 5), st.integers(1, 400), st.integers(1, 400), st.integers(1, 9))
def test_parcels_are_no_larger_than_the_limit(
    shapes: Any, dp: int, least: int, most: int, shares: int
) -> None:
    """But for a row of every replica more, where one tensor alone is larger: rows are not cut."""
    items = [shards.Item(str(i), shape, torch.float32) for i, shape in enumerate(shapes)]
    total = sum(4 * torch.Size(shape).numel() for shape in shapes)
    limit = max(least, min(most, total // shares))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "LEAST_BYTES", least)
        patch.setattr(shards, "PARCEL_BYTES", most)
        patch.setattr(shards, "SHARES", shares)
        parcels = shards.parcels_of(items, dp)
    for parcel in parcels:
        if 4 * sum(parcel.sizes) > limit:
            (item,) = parcel.items
            assert 4 * sum(parcel.sizes) <= limit + dp * 4 * torch.Size(item.shape[1:]).numel()
    for one, other in pairwise(parcels):
        first = sum(other.items[0].numel(dp, r) for r in range(dp))
        assert 4 * (sum(one.sizes) + first) > limit, "a parcel left before it was full"


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_addends_of_another_dtype_come_in_pieces(sizes: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "PIECE", 16)
        for size in sizes:
            total, grad = torch.randn(size), torch.randn(size).bfloat16()
            expected = total + grad.float()
            ops.add_gradient(total, grad)
            assert torch.equal(total, expected)


def test_norms_of_large_gradients_count_all_elements() -> None:
    """Of more than the elements that are squared at once."""
    count = 2**20 + 8
    assert count > norms.AT_ONCE > norms.IN_CACHE
    grad = torch.ones(count // 4, 4)
    assert norms.own_powers(grad, 2.0) == count
    assert powers(grad, 3, 2.0) == [4 * n for n in (87382, 87382, count // 4 - 2 * 87382)]


def test_the_loss_scale_stays_between_its_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "MIN_SCALE", 0.5)
    monkeypatch.setattr(precision, "MAX_SCALE", 4.0)
    scaler = LossScaler(LossScale(init=1.0, interval=1))
    seen = []
    for finite in (True, True, True, False, False, False, False, False):
        scaler.saw(finite)
        scaler.end_step()
        seen.append(scaler.scale)
    assert seen == [2, 4, 4, 2, 1, 0.5, 0.5, 0.5]


# -- what is initialised at once ------------------------------------------------------------------


def test_few_divided_tensors_are_whole_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is kept whole is made first; the rest in groups of the largest tensor's size, or of
    an n-th of all."""

    def places(**rows: int) -> dict[str, Allocation]:
        cut = {"kept": None}
        return {
            name: Allocation(torch.empty(n, device="meta"), [CPU], cut.get(name, lambda t: t[:1]))
            for name, n in rows.items()
        }

    monkeypatch.setattr(initializers, "RUNS", 2)
    many = places(a=4, kept=100, b=4, c=4, d=4, e=4)
    groups = [list(group) for group in initializers._groups(many)]
    assert groups == [["kept"], ["a", "b"], ["c", "d"], ["e"]]
    monkeypatch.setattr(initializers, "RUNS", 5)
    groups = [list(group) for group in initializers._groups(places(a=9, b=4, c=4, d=4))]
    assert groups == [["a"], ["b", "c"], ["d"]]


# -- what is planned ------------------------------------------------------------------------------


def menus(layers: int) -> list[tuple[stash.Stash, ...]]:
    graph = units.captured(models.Residual(layers, 64), torch.ones(256, 64))
    locality = locality_of(graph)
    return menus_.options_of(
        *stash.bodies_of(graph, locality, units_of(graph, locality, H100)), H100
    )


def test_a_menu_has_so_many_options_the_ends_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutter, "MAX_OPTIONS", 9)
    whole = menus(3)
    assert max(map(len, whole)) > 3
    monkeypatch.setattr(cutter, "MAX_OPTIONS", 3)
    for menu, all_of_it in zip(menus(3), whole, strict=True):
        assert len(menu) == min(3, len(all_of_it))
        for end in (0, -1):
            assert menu[end].label == all_of_it[end].label
            assert menu[end].stash_bytes == all_of_it[end].stash_bytes


@pytest.mark.parametrize("most", [0, 1, 3])
def test_so_many_units_in_a_row_forget_their_outputs(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(menus_, "MAX_FORGETFUL", most)
    marks = "".join("x" if menu[-1].forgets else " " for menu in menus(8))
    assert max(map(len, marks.split())) == most if most else not marks.strip()


def test_so_many_stages_are_tried_for_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight units of 10 bytes fit into 20 bytes on four stages and not on three."""
    row = tuple((Option(1.0, static_bytes=10.0),) for _ in range(8))
    edges = tuple((i, i + 1) for i in range(7))
    problem = Problem(row, edges, 2, budget_bytes=(20.0, 20.0), min_units=1)
    nearest = solution_of(problem, (0,) * 4 + (1,) * 4, (0,) * 8, "dynamic")
    options = CompileOptions(n_stages=2)
    assert "n_stages=4 would fit" in advice.advice(problem, nearest, options, 1)
    monkeypatch.setattr(advice, "MAX_STAGES", 3)
    assert not any("n_stages" in each for each in advice.advice(problem, nearest, options, 1))


def test_ever_finer_microbatches_are_tried_where_memory_is_short() -> None:
    """Up to eight times as many; what fails for another reason is not tried again."""
    tried: list[tuple[int, int]] = []

    def build(way: Way, finer: int) -> Any:
        tried.append((way.n_stages, finer))
        if way.n_stages == 3:
            raise PartitionError("too few units")
        raise MemoryBudgetError("too much", (1.0,), NEAREST, True)

    with pytest.raises(pipecompile.errors.OptionError, match="1 × dp 3: too much; 3 × dp 1: too f"):
        choose(Open(True, False).ways(CompileOptions(n_stages=1), 3), build)
    assert tried == [(1, 1), (1, 2), (1, 4), (1, 8), (3, 1)]


NEAREST = solution_of(Problem(((Option(1.0),),), (), 1), (0,), (0,), "dynamic")


# -- what is measured -----------------------------------------------------------------------------


def test_units_that_are_timed_in_turn_take_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = units.programs(units.captured(models.Residual(6), torch.ones(4, 8)))
    timed: list[Any] = [profile._Unit(program, {}) for program in programs]
    sizes = [profile._argument_bytes(program) for program in programs]
    for limit in (1, 2 * max(sizes), sum(sizes)):
        monkeypatch.setattr(profile, "GROUP_BYTES", limit)
        groups = list(profile._groups(timed))
        assert [unit for group in groups for unit in group] == timed
        for group in groups:
            held = sum(profile._argument_bytes(unit.program) for unit in group)
            assert held <= limit or len(group) == 1
    assert len(groups) == 1


def test_large_arguments_repeat_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_NOISE", 8)
    made = Synthesizer(CPU).tensor(torch.empty(4, 5))
    noise = made.view(-1)[:8]
    assert noise.abs().max() < 8 * synthetic.SCALE
    assert len(set(noise.tolist())) == 8
    assert torch.equal(made.view(-1), noise.repeat(3)[:20])


def test_programs_that_were_not_used_for_longest_go() -> None:
    """And are compiled anew, with the same bits; the plan is still the first one's."""
    sizes = (2, 3, 4, 2, 5, 3, 3)
    options: dict[str, Any] = {"microbatches": 1, "optimizer": jobs.SGD}
    model = models.Residual(2)
    pipe, other = (pipecompile.compile(model, 2, **options) for _ in range(2))
    for rows in sizes:
        given = torch.randn(rows, 8)
        with mock.patch.object(session, "MOST_PROGRAMS", 2):
            loss = pipe.step(given)
        assert len(pipe._session.loaded) <= 2
        assert torch.equal(loss, other.step(given))
    assert len(other._session.loaded) == len(set(sizes))
    assert pipe.plan.shape == other.plan.shape
