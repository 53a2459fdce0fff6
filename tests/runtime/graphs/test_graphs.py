"""Recorded programs have the bits of those that run: over a stand-in that keeps places as CUDA
graphs do (`support.graphs`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.ir import ops
from pipecompile.compiler.ir.actions import from_text, slots_of
from pipecompile.compiler.memory.graphed import graphed_bytes
from pipecompile.errors import BatchError, OptionError
from pipecompile.passes.schedule.registry import SCHEDULES
from pipecompile.runtime.graphs import recorder
from pipecompile.runtime.graphs.graphs import copied
from support import jobs, models, plain
from support.gang import Gang
from support.graphs import recording
from support.matrix import quickly
from torch import nn

oracle = functools.cache(jobs.train_plainly)


def trained(*given: Any, **options: Any) -> plain.Trained:
    with recording() as counts:
        found = jobs.train(*given, cudagraphs=True, **options)
    assert counts.recorded
    assert counts.replayed
    return found


# -- bits ------------------------------------------------------------------------------------------


def test_small_models_have_the_bits_of_eager_programs() -> None:
    model = functools.partial(models.Residual, 4)
    expected, state, _ = losses(model=model)
    with recording() as counts:
        found, own, _ = losses(model=model, cudagraphs=True)
    assert plain.equal((found, own), (expected, state))
    assert (counts.recorded, counts.replayed) == (6, 42)  # 2 + 1 slots, F and B; 3 steps of 16 runs


@pytest.mark.slow
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_schedule_has_the_bits_of_plain_training(schedule: str) -> None:
    given = ("llama-deep", 2, 1, 4, "adamw", 3)
    found = trained(*given, schedule)
    plain.assert_equal(found, oracle("llama-deep", 1, 4, "adamw", 3))


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    quickly(
        [],
        [
            ("gpt2", (3, 1, 4), {}),
            ("gpt2", (2, 2, 2), {}),
            ("gpt2", (2, 1, 4), {"remat": "full"}),
            ("gpt2", (3, 1, 4), {"tied_grads": "per_microbatch", "schedule": "zb_h1"}),
            ("bart", (3, 1, 4), {}),
            ("t5", (2, 1, 4), {}),
            ("bert-mlm", (1, 1, 4), {}),
            ("mixtral", (2, 1, 2), {}),
            ("vit", (2, 2, 2), {}),
        ],
    ),
)
def test_models_have_the_bits_of_plain_training(
    name: str, shape: tuple[int, int, int], options: dict[str, Any]
) -> None:
    _, dp, microbatches = shape
    found = trained(name, *shape, "adamw", 3, **options)
    plain.assert_equal(found, oracle(name, dp, microbatches, "adamw", 3))


@pytest.mark.slow
def test_divided_states_have_the_bits_of_eager_programs() -> None:
    given = ("gpt2", 2, 2, 2, "adamw", 3)
    plain.assert_equal(trained(*given, zero=1), jobs.train(*given, zero=1))


class Dropped(nn.Module):
    """Dropout twice, and a buffer that forward updates."""

    traced_once = True

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            x = x + nn.functional.dropout(layer(x), 0.5 if i % 2 else 0.0)
        self.seen.add_(x.detach().mean(0))
        return x.square().mean()


def losses(steps: int = 4, model: Callable[[], nn.Module] = Dropped, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"n_stages": 2, "microbatches": 4, "optimizer": jobs.SGD, "seed": 7} | options
    pipe = pipecompile.compile(model(), **options)
    batches = torch.randn(steps, 8, 8)
    return [pipe.step(batch) for batch in batches], pipe.state_dict(), pipe


def test_every_replay_draws_masks_of_its_own() -> None:
    expected, state, _ = losses()
    with recording() as counts:
        found, own, _ = losses(cudagraphs=True)
    assert plain.equal(found, expected)
    assert plain.equal(own, state)
    assert sum(counts.draws) > 0


def test_gradients_add_up_over_calls() -> None:
    """Slots that have something go on with it, recorded or not."""
    x = torch.randn(4, 8, 8)
    runs = []
    for graphs in (False, True):
        with recording():
            *_, pipe = losses(1, functools.partial(models.Residual, 4), cudagraphs=graphs)
            for batch in x:
                pipe.forward_backward(batch)
        runs.append({name: p.grad for name, p in pipe.named_parameters()})
    assert plain.equal(runs[1], runs[0])


def test_what_lies_elsewhere_since_is_recorded_anew() -> None:
    """As ``param.data = ...`` does it; and constants that are made of loaded buffers."""
    x = torch.randn(3, 8, 8)
    runs = []
    for graphs in (False, True):
        with recording() as counts:
            _, _, pipe = losses(2, cudagraphs=graphs)
            before = counts.recorded
            for param in pipe.parameters():
                param.data = param.data * 2
            runs.append([pipe.step(each) for each in x])
            assert counts.recorded == 2 * before
    assert plain.equal(runs[1], runs[0])


@pytest.mark.slow
def test_fp16_has_the_bits_of_a_grad_scaler() -> None:
    found = trained("gpt2", 2, 1, 2, "adamw", 3, precision="fp16")
    expected = oracle("gpt2", 1, 2, "adamw", 3, dtype=torch.float16)
    assert plain.equal(found.losses, expected.losses)
    assert plain.equal(found.params, expected.params)


def recorded_between_processes(zero: int, dp: int) -> tuple[Any, Any, int]:
    """What a process of a gang runs."""
    with recording() as counts:
        given = ("gpt2", 2 // dp, dp, 2, "adamw", 3)
        found = jobs.train(*given, cudagraphs=True, zero=zero)
    return found.losses, found.params, counts.replayed


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "dp"), [(0, 1), (0, 2), (1, 2)])
def test_processes_have_the_bits_of_plain_training(
    gang: Callable[[int], Gang], zero: int, dp: int
) -> None:
    run = (gang(2).run(jobs.train, "gpt2", 2 // dp, dp, 2, "adamw", 3, zero=zero))[0]
    for found, params, replayed in gang(2).run(recorded_between_processes, zero, dp):
        assert replayed
        assert plain.equal(found, run.losses)
        assert plain.equal(params, run.params)


class Generator:
    """Notes what is done to it; one that stands for the other has its state."""

    def __init__(self, device: Any = None):
        self.state: list[Any] = []

    def graphsafe_get_state(self) -> Generator:
        kept = Generator()
        kept.state = self.state
        return kept

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state

    def manual_seed(self, seed: int) -> None:
        self.state.append(seed)


def test_each_random_operator_is_recorded_with_a_generator_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And has the seed that an eager one has, in every replay; the default one is left alone."""
    default = Generator()
    mine = default.state
    monkeypatch.setattr(recorder, "generator_of", lambda device: default)
    monkeypatch.setattr(recorder.torch, "Generator", Generator)
    chances = recorder._Chances(torch.device("cuda", 0), 2)
    drawn = [
        chances.draw(site, lambda: default.state.append(f"op {site}") or site, (), {})  # noqa: B023
        for site in (3, 5)
    ]
    assert drawn == [3, 5]
    chances.seed(7)
    chances.seed(8)
    assert [each.state for each in chances.generators] == [
        [f"op {site}", ops.mix(7, site), ops.mix(8, site)] for site in (3, 5)
    ]
    assert default.state is mine
    assert not mine


# -- where they are ----------------------------------------------------------------------------


def test_what_is_sent_is_no_part_of_a_slot() -> None:
    """Strides stay, also those of repeated elements."""
    tensor = torch.arange(6.0).reshape(2, 3).t().unsqueeze(1).expand(3, 4, 2)
    made = copied(tensor)
    assert made.data_ptr() != tensor.data_ptr()
    assert made.stride() == tensor.stride()
    assert torch.equal(made, tensor)


def test_a_slot_is_free_when_the_last_action_of_its_microbatch_is_over() -> None:
    (actions,) = from_text("0F0 0F1 0B0 0F2 0B1 0B2")
    assert slots_of(actions, 0) == {0: 0, 1: 1, 2: 0}
    (actions,) = from_text("0F0 0B0 0F1 0W0 0B1 0W1")
    assert slots_of(actions, 0) == {0: 0, 1: 1}


def test_plans_count_what_is_never_given_back() -> None:
    """All microbatches of gpipe are in flight; of 1f1b one, on the last stage."""
    peaks = {}
    for schedule in ("gpipe", "1f1b"):
        for graphs in (False, True):
            with recording():
                model = functools.partial(models.Residual, 4)
                *_, pipe = losses(1, model, schedule=schedule, cudagraphs=graphs)
            peaks[schedule, graphs] = [stage.memory.peak for stage in pipe.plan.stages]
            (actions, _) = pipe._session.first.schedule
            held = graphed_bytes(pipe.programs, actions) + sum(
                value
                for name, value in vars(pipe.plan.stages[0].memory).items()
                if name not in ("peak", "peak_at")
            )
            if graphs:
                assert pipe.plan.stages[0].memory.peak == max(held, peaks[schedule, False][0])
    assert all(map(int.__ge__, peaks["1f1b", True], peaks["1f1b", False]))
    assert peaks["gpipe", True][1] > peaks["1f1b", True][1]


# -- where there are none ----------------------------------------------------------------------


def test_a_cpu_has_none() -> None:
    with pytest.raises(OptionError, match="cudagraphs=True records work of a CUDA device"):
        losses(cudagraphs=True)
    _, _, pipe = losses(1, cudagraphs="auto")
    assert "cudagraphs" not in dict(pipe.plan.notes)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dynamic": {"x": {1: (1, 8)}}}, "dynamic= announces ranges"),
        ({"zero": 3, "dp": 2}, "zero=3: give zero=0 or 1"),
        ({"zero": 2, "dp": 2}, "zero=2: give zero=0 or 1"),
        ({"eager_modules": ["layers.1"]}, "layers.1 runs eagerly"),
    ],
)
def test_what_cannot_be_recorded_is_an_error(options: dict[str, Any], says: str) -> None:
    with recording(), pytest.raises(OptionError, match=says):
        losses(1, functools.partial(models.Residual, 6), cudagraphs=True, **options)


def test_auto_runs_eagerly_what_cannot_be_recorded_and_says_so() -> None:
    model = functools.partial(models.Residual, 6)
    options = {"eager_modules": ["layers.1"]}
    expected, state, _ = losses(3, model, **options)
    with recording() as counts:
        found, own, pipe = losses(3, model, cudagraphs="auto", **options)
    assert not counts.recorded
    assert dict(pipe.plan.notes)["cudagraphs"] == "not recorded: layers.1 runs eagerly, in Python"
    assert plain.equal((found, own), (expected, state))


def test_another_shape_is_an_error_or_runs_eagerly() -> None:
    x = torch.randn(8, 8)
    with recording():
        _, _, pipe = losses(2, cudagraphs=True)
        with pytest.raises(BatchError, match="come after such of"):
            pipe.step(x[:4])
    with recording() as counts:
        _, _, pipe = losses(2, cudagraphs="auto")
        recorded = counts.recorded
        found = [pipe.step(x[:4]) for _ in range(2)] + [pipe.step(x)]
    assert counts.recorded == recorded
    assert "the first, are recorded" in dict(pipe.plan.notes)["cudagraphs"]
    _, _, pipe = losses(2)
    assert plain.equal(found, [pipe.step(x[:4]) for _ in range(2)] + [pipe.step(x)])


def test_uneven_microbatches_mix_recorded_and_eager_ones() -> None:
    x = torch.randn(3, 7, 8)
    runs = []
    for graphs in (False, "auto"):
        with recording():
            _, _, pipe = losses(1, cudagraphs=graphs)
            runs.append([pipe.step(each) for each in x])
    assert plain.equal(runs[1], runs[0])
