"""Measured times: what counts as equal, what is kept, and that times add up."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pipecompile.compiler.ir.actions import Kind
from pipecompile.compiler.ir.errors import PlanError
from pipecompile.compiler.ir.program import Program, StageProgram
from pipecompile.compiler.kept.cache import default_cache_dir
from pipecompile.compiler.kept.optimizers import Optimizers
from pipecompile.compiler.memory.optimizer_cost import (
    STEPS,
    optimizer_memory,
    optimizer_seconds,
)
from pipecompile.compiler.plan.plan import Plan
from pipecompile.compiler.profiling import timing_cache
from pipecompile.compiler.profiling.profile import Profiler, program_hash
from pipecompile.compiler.profiling.timing_cache import TimingCache
from support import models, plans, units
from support.matrix import quickly

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpt2() -> list[StageProgram]:
    torch.manual_seed(0)
    return units.programs(units.captured(models.gpt2(), models.tokens(2)))


def hashes(programs: list[StageProgram]) -> dict[Kind, list[str]]:
    return {part: [program_hash(p.parts[part]) for p in programs] for part in programs[0].parts}


def changed(**changes: Any) -> set[str]:
    """The hashes of a GPT-2 that is another in one respect."""
    length = changes.pop("length", 12)
    dtype = changes.pop("dtype", torch.float32)
    model = models.gpt2(n_layer=1, **changes).to(dtype)
    programs = units.programs(units.captured(model, models.tokens(2, length)), whole=True)
    return set(hashes(programs)[Kind.F])


def test_equal_layers_are_timed_once(gpt2: list[StageProgram]) -> None:
    found = hashes(gpt2)
    assert len(set(found[Kind.F])) < len(gpt2) - 1
    assert len(set(found[Kind.B])) < len(gpt2) - 1
    profiler = Profiler(CPU, None, 5)
    times = profiler.times(gpt2)
    distinct = len(set(found[Kind.F]) | set(found[Kind.B]))
    assert profiler.note == f"{distinct} programs measured, 0 known from before"
    pairs = list(zip(*found.values(), times, strict=True))
    assert len({(f, b) for f, b, _ in pairs}) == len({(f, b, t) for f, b, t in pairs})
    assert all(t.forward_s > 0 and t.backward_s > 0 for t in times)


@pytest.mark.slow
def test_a_hash_sees_shapes_types_and_structure_and_not_names() -> None:
    first, again = changed(), changed()
    assert first == again
    others = (
        changed(n_embd=64),
        changed(length=10),
        changed(dtype=torch.bfloat16),
        changed(dropout=0.1),
        changed(activation_function="relu"),
    )
    assert all(first.isdisjoint(other) for other in others)


def test_layers_with_dropout_are_equal_though_each_draws_its_own() -> None:
    model = models.gpt2(dropout=0.1, n_layer=2)
    found = hashes(units.programs(units.captured(model.train(), models.tokens(2))))
    assert len(set(found[Kind.F])) < len(found[Kind.F])


@pytest.mark.parametrize("name", quickly([], ["llama", "t5", "mixtral", "vit", "bart"]))
def test_every_kind_of_model_can_be_timed(name: str) -> None:
    graph = units.captured(models.build(name), models.batches(name, 2, 1)[0])
    programs = units.programs(graph)
    profiler = Profiler(CPU, None, 1)
    state = torch.random.get_rng_state()
    times = profiler.times(programs)
    assert torch.equal(state, torch.random.get_rng_state())
    assert "estimated" not in profiler.note
    assert len(times) == len(programs)


@pytest.mark.slow
def test_units_add_up_to_the_whole() -> None:
    """Large enough for operators to outweigh calls; the factor is for a noisy machine."""
    model = models.gpt2(n_embd=128, n_positions=128, n_layer=2)
    graph = units.captured(model, models.tokens(4, 128))
    sums = []
    for programs in (
        units.programs(graph),
        units.programs(graph, whole=True),
        units.programs(graph, split=True),
    ):
        times = Profiler(CPU, None, 5).times(programs)
        sums.append(sum(t.forward_s + t.backward_s for t in times))
    assert max(sums) < 2 * min(sums)


def test_stages_run_in_the_order_of_a_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the values that their own microbatch has made, as often as it takes."""
    graph = units.captured(models.gpt2(n_layer=2), models.tokens(2))
    stages = units.programs(graph, split=True)[1:3]
    words = ["0F0", "1F0", "0F1", "1B0", "1F1", "0B0", "1B1", "1W0", "0B1", "0W1", "1W1", "0W0"]
    order = [(int(stage), Kind(kind), int(microbatch)) for stage, kind, microbatch in words]
    names = {id(p): (i, k) for i, s in enumerate(stages) for k, p in s.parts.items()}
    ran: list[tuple[int, Kind]] = []
    measure = Profiler._time

    def noted(self: Profiler, program: Program, arguments: list[Any]) -> Any:
        ran.append(names[id(program)])
        return measure(self, program, arguments)

    monkeypatch.setattr(Profiler, "_time", noted)
    times = Profiler(CPU, None, 5).times(stages, (), order)
    warm, wanted = 6, [(i, kind) for i, kind, _ in order]
    assert len(ran) > warm + len(wanted)
    steps = ran[warm:]
    assert steps == (wanted * len(steps))[: len(steps)]
    assert all(0 < each.weight_s < each.backward_s for each in times)


def test_split_weight_gradients_count_as_measured() -> None:
    """And not by the device's rates; a plan's file has it."""
    plan, _ = plans.hand_made()
    decision = plan.decision.scaled({1: (1.0, 8.0, 2.0), 0: (1.0, 4.0, 0.0)})
    assert decision.weight_shares == (0.0, 0.25)
    assert sum(backward for _, (_, backward, _) in decision.stages_and_seconds) == 12.0
    again = Plan.from_json(replace(plan, decision=decision).to_json())
    assert again.decision.weight_shares == (0.0, 0.25)
    with pytest.raises(PlanError, match="shares of 1 of 2 stages"):
        Plan.from_json(replace(plan, decision=replace(decision, weight_shares=(0.5,))).to_json())


def test_a_used_up_budget_leaves_scaled_estimates(gpt2: list[StageProgram]) -> None:
    profiler = Profiler(CPU, None, 1e-9)
    times = profiler.times(gpt2)
    assert "estimated: budget of 1e-09 s is up" in profiler.note
    assert all(t.forward_s > 0 for t in times)


def test_a_program_that_cannot_run_is_estimated(
    gpt2: list[StageProgram], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpt2[-1].forward.module, "forward", fail)
    profiler = Profiler(CPU, None, 5)
    times = profiler.times(gpt2)
    assert "could not be run (RuntimeError: no such kernel)" in profiler.note
    assert times[-1].forward_s > 0


def test_times_are_kept_on_disk(gpt2: list[StageProgram], tmp_path: Path) -> None:
    first = Profiler(CPU, tmp_path, 5).times(gpt2)
    profiler = Profiler(CPU, tmp_path, 0)
    assert profiler.times(gpt2) == first
    assert profiler.note.startswith("0 programs measured")
    (file,) = tmp_path.iterdir()
    assert str(torch.get_num_threads()) in file.name
    assert torch.__version__.partition("+")[0] in file.name


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1}', '{"version": 0, "seconds": {"a": 1}}']
)
def test_damaged_and_foreign_files_are_written_anew(tmp_path: Path, text: str) -> None:
    path = TimingCache(CPU, tmp_path).path
    assert path is not None
    path.write_text(text)
    cache = TimingCache(CPU, tmp_path)
    assert cache.seconds == {}
    assert cache.add({"key": 0.5})
    assert TimingCache(CPU, tmp_path).seconds == {"key": 0.5}


def test_wrong_times_in_a_file_of_the_right_kind_are_ignored(tmp_path: Path) -> None:
    cache = TimingCache(CPU, tmp_path)
    cache.add({"key": 0.5})
    assert cache.path is not None
    whole = json.loads(cache.path.read_text())
    cache.path.write_text(json.dumps(whole | {"seconds": {"key": "soon"}}))
    assert TimingCache(CPU, tmp_path).seconds == {}


def test_writers_keep_what_others_wrote(tmp_path: Path) -> None:
    one, other = TimingCache(CPU, tmp_path), TimingCache(CPU, tmp_path)
    one.add({"a": 1.0})
    other.add({"b": 2.0})
    assert TimingCache(CPU, tmp_path).seconds == {"a": 1.0, "b": 2.0}
    assert len(list(tmp_path.iterdir())) == 1  # no temporary file is left


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    cache = TimingCache(CPU, blocked)
    assert not cache.add({"a": 1.0})
    assert cache.seconds == {"a": 1.0}


def test_where_times_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PIPECOMPILE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path.home() / ".cache" / "pipecompile"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "pipecompile"
    monkeypatch.setenv("PIPECOMPILE_CACHE", str(tmp_path / "mine"))
    assert default_cache_dir() == tmp_path / "mine"


def test_another_device_or_thread_count_has_another_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here = TimingCache(CPU, tmp_path).path
    monkeypatch.setattr(timing_cache, "device_name", lambda device: "another CPU")
    assert TimingCache(CPU, tmp_path).path != here


# -- optimizers -----------------------------------------------------------------------------

SHAPES = {"weight": (300, 40), "bias": (300,), "norm": (40,)}
BYTES = {name: 4 * torch.Size(shape).numel() for name, shape in SHAPES.items()}
TOTAL = sum(BYTES.values())
COUNTERS = 4 * len(SHAPES)  # a float32 step count per parameter


def parameters(device: str = "meta") -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device=device) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    ("factory", "states", "transient"),
    [
        (torch.optim.SGD, 0, 0),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), TOTAL, 0),
        # the denominator and one temporary at a time, for the largest parameter
        (torch.optim.AdamW, 2 * TOTAL + COUNTERS, 2 * BYTES["weight"]),
        # for all parameters at once
        (partial(torch.optim.AdamW, foreach=True), 2 * TOTAL + COUNTERS, TOTAL),
        (partial(torch.optim.AdamW, amsgrad=True), 3 * TOTAL + COUNTERS, 2 * BYTES["weight"]),
    ],
)
def test_optimizer_bytes_are_exact(factory: Any, states: int, transient: int) -> None:
    memory = optimizer_memory(factory, parameters())
    assert memory.exact
    assert memory.total_state_bytes == states
    assert memory.shared_bytes == 0
    assert memory.transient_bytes == transient
    assert set(memory.state_bytes) == set(SHAPES)
    if states:
        each = states - (COUNTERS if states > TOTAL else 0)
        share = {name: n - (4 if states > TOTAL else 0) for name, n in memory.state_bytes.items()}
        assert share == {name: each // TOTAL * n for name, n in BYTES.items()}


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_a_gpu_that_is_planned_for_steps_all_at_once(options: dict[str, Any]) -> None:
    factory, params = partial(torch.optim.AdamW, **options), parameters("cpu")
    here, there = (Optimizers(None).memory(factory, params, kind) for kind in ("cpu", "cuda"))
    assert here.state_bytes == there.state_bytes
    assert here.transient_bytes == (0 if options else 2 * BYTES["weight"])
    assert there.transient_bytes == (0 if options else TOTAL)
    assert there.exact


@pytest.mark.parametrize("name", ["Adafactor", "Adagrad", "NAdam", "RAdam", "RMSprop", "Rprop"])
def test_fake_steps_take_what_real_ones_take(name: str) -> None:
    factory = getattr(torch.optim, name)
    params = {n: torch.nn.Parameter(torch.zeros(s)) for n, s in SHAPES.items()}
    optimizer = factory(list(params.items()))
    for param in params.values():
        param.grad = torch.ones_like(param)
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    expected = sum(t.nbytes for t in states if isinstance(t, torch.Tensor))
    assert optimizer_memory(factory, parameters()).total_state_bytes == expected


class NeedsData(torch.optim.SGD):
    """Looks at its parameters' values, as fake tensors do not let it."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                assert len(param.detach().numpy().tobytes())
        super().step(closure)


def test_an_optimizer_that_needs_data_is_scaled_from_small_parameters() -> None:
    memory = optimizer_memory(partial(NeedsData, lr=0.1, momentum=0.9), parameters())
    assert not memory.exact
    assert memory.total_state_bytes == pytest.approx(TOTAL, rel=0.05)


def test_the_errors_of_a_factory_are_its_own() -> None:
    with pytest.raises(ValueError, match="learning rate"):
        optimizer_memory(partial(torch.optim.SGD, lr=-1.0), parameters())


def test_optimizer_seconds_grow_with_bytes() -> None:
    small = {f"p{i}": torch.empty(512, 512, device="meta") for i in range(4)}
    large = {f"p{i}": torch.empty(8192, 4096, device="meta") for i in range(4)}
    adamw = partial(torch.optim.AdamW, fused=True)
    small_s, large_s = (optimizer_seconds(adamw, params, CPU) for params in (small, large))
    assert 0 < small_s < large_s / 4


def test_clipping_is_part_of_what_is_measured() -> None:
    params = {f"p{i}": torch.empty(8, 4, device="meta") for i in range(3)}
    seen: list[torch.Tensor] = []
    assert optimizer_seconds(partial(torch.optim.SGD, lr=0.1), params, CPU, seen.append) > 0
    assert len(seen) == 3 * (1 + STEPS)
    assert {tuple(grad.shape) for grad in seen} == {(8, 4)}


def test_times_that_are_none_are_left_out_and_written_over(tmp_path: Path) -> None:
    path = TimingCache(CPU, tmp_path).path
    assert path is not None
    TimingCache(CPU, tmp_path).add({"fine": 0.5})
    bad = '"a": NaN, "b": -1, "c": Infinity, "d": {"e": 1}, "f": "1", "g": true, "h": 1e30'
    huge = f'"i": 1{"0" * 400}, "j": null, "k": [1]'
    path.write_text(path.read_text().replace('"fine": 0.5', f'"fine": 0.5, {bad}, {huge}'))
    cache = TimingCache(CPU, tmp_path)
    assert cache.seconds == {"fine": 0.5}
    assert cache.add({"a": 0.25})
    assert json.loads(path.read_text())["seconds"] == {"fine": 0.5, "a": 0.25}
    path.write_text("[" * 100_000)
    assert TimingCache(CPU, tmp_path).seconds == {}


def test_a_home_that_nobody_knows_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("PIPECOMPILE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    assert default_cache_dir() is None
