"""Weights that are made where they are needed, by the model's own initialisers."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pipecompile
import pytest
import torch
from pipecompile import errors
from pipecompile.compiler.capture.skeleton import Skeleton, skeleton_of
from pipecompile.compiler.ir.shards import rows_of
from pipecompile.compiler.tensors.facts import digest, sample
from pipecompile.compiler.tensors.fakes import weightless
from pipecompile.runtime.weights.initializers import Initializers
from pipecompile.runtime.weights.materialize import materialize, source_of
from support import jobs, models, plain
from support.gang import Gang
from support.matrix import quickly
from support.measured import RealMeter
from support.weightless import CPU, State, Tiny, assert_same, compiled, empty, saved
from torch import nn


def drawn(model: nn.Module, names: list[str] | None = None, seed: int = 3) -> State:
    """What the initialisers give, without compiling."""
    skeleton = skeleton_of(model, CPU)
    chosen = list(dict.fromkeys(skeleton.canonical.values())) if names is None else names
    made = materialize(Initializers(model, skeleton, seed), skeleton, {CPU: chosen})
    return {name: allocation.held[CPU] for name, allocation in made.items()}


@pytest.mark.parametrize("name", quickly(["gpt2", "t5", "vit"], models.MODELS))
def test_initialisers_give_each_tensor_the_same_whatever_else_is_held(name: str) -> None:
    model = empty(name)
    whole = drawn(model)
    names = list(whole)
    random.Random(0).shuffle(names)
    for part in range(3):
        mine = drawn(model, names[part::3])
        assert_same(mine, {key: whole[key] for key in mine})


def test_seeds_give_different_weights() -> None:
    name = "transformer.wte.weight"
    first, second = (drawn(empty("gpt2"), [name], seed)[name] for seed in (3, 4))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", quickly(["gpt2", "t5", "vit"], models.MODELS))
def test_initialisers_are_those_of_an_ordinary_construction(name: str) -> None:
    """Constants and buffers are equal, also those in no state dict; the rest has its spread."""
    real = models.build(name)
    ordinary = dict(real.named_parameters()) | dict(real.named_buffers())
    for key, tensor in drawn(empty(name)).items():
        there = ordinary[key].float()
        if there.numel() < 2 or there.std() == 0 or not ordinary[key].requires_grad:
            assert torch.equal(tensor, ordinary[key]), key
        elif there.numel() > 200:
            assert 0.8 < tensor.float().std() / there.std() < 1.25, key


def test_fake_and_meta_models_get_the_same() -> None:
    with weightless():
        fake = models.build("gpt2")
    whole = drawn(empty("gpt2"))
    assert_same(drawn(fake), whole)
    for part in (0, 1):
        mine = drawn(fake, list(whole)[part::2])
        assert_same(mine, {name: whole[name] for name in mine})


def initialised(n_stages: int, dp: int) -> State:
    return compiled(empty("gpt2"), n_stages, dp).state_dict()


@pytest.mark.slow
def test_any_stages_and_processes_start_alike(gang: Callable[[int], Gang]) -> None:
    expected = initialised(1, 1)
    for n_stages in (2, 3):
        assert_same(initialised(n_stages, 1), expected)
    for n_stages, dp in ((2, 1), (1, 2)):
        for found in gang(2).run(initialised, n_stages, dp):
            assert_same(found, expected)
    assert torch.equal(expected["lm_head.weight"], expected["transformer.wte.weight"])


def trained(name: str, n_stages: int) -> tuple[State, plain.Trained]:
    pipe = compiled(empty(name), n_stages, batch=name)
    return pipe.state_dict(), plain.train_pipeline(pipe, models.batches(name, 4, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", quickly(["llama"], ["llama", "t5", "bert-mlm"]))
def test_training_from_them_is_training_from_their_state_dict(
    gang: Callable[[int], Gang], name: str
) -> None:
    first, second = gang(2).run(trained, name, 2)
    model = models.build(name, seed=9)
    model.load_state_dict(first[0])
    expected = plain.train(
        model, models.batches(name, 4, 2), jobs.OPTIMIZERS["sgd"], 1, microbatches=2
    )
    for start, found in (first, second):
        assert_same(start, first[0])
        plain.assert_equal(found, expected, whole=False)


@pytest.mark.slow
def test_auto_stages() -> None:
    pipe = pipecompile.compile(
        empty("gpt2"), "auto", devices=2, seed=3, example_batch=models.batches("gpt2", 8, 1)[0]
    )
    state = pipe.state_dict()
    assert_same(state, {name: drawn(empty("gpt2"))[pipe_first(name)] for name in state})
    pipe.load_state_dict(models.build("gpt2").state_dict())
    assert_same(pipe.state_dict(), models.build("gpt2").state_dict())


def pipe_first(name: str) -> str:
    return "transformer.wte.weight" if name == "lm_head.weight" else name


def test_the_users_random_numbers_go_on() -> None:
    model = empty("gpt2")
    before = torch.get_rng_state()
    drawn(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_has_data_keeps_it() -> None:
    model = empty("gpt2")
    model.transformer.ln_f.weight = nn.Parameter(torch.full((32,), 7.0))  # no initialiser's
    skeleton = skeleton_of(model, CPU)
    made = materialize(
        source_of(model, skeleton, None, 3, warn=False),
        skeleton,
        {CPU: ["transformer.ln_f.weight", "transformer.ln_f.bias"]},
    )
    assert torch.equal(made["transformer.ln_f.weight"].held[CPU], torch.full((32,), 7.0))
    assert torch.equal(made["transformer.ln_f.bias"].held[CPU], torch.zeros(32))


class Scaled(Tiny):
    """A parameter that only the constructor sets."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))


class Shrinking(Scaled):
    """Its initialiser relies on what the constructor drew."""

    def reset_parameters(self) -> None:
        self.scale.mul_(torch.empty_like(self.scale).normal_())


class Rotating(Tiny):
    """A buffer that is in no state dict, and that only the constructor sets."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.arange(8.0), persistent=False)


class Failing(Tiny):
    def reset_parameters(self) -> None:
        raise ArithmeticError("no numbers left")


class Applying(Tiny):
    """A model that initialises itself as nanoGPT does; trunc_normal_ skips meta tensors."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, mean=5.0, a=4.0, b=6.0)
            module.bias.copy_(torch.rand(8).round() + 1)
            nn.init.orthogonal_(module.weight) if module is self.second else None


class Calling(Tiny):
    """One initialiser for all, with a generator of its own."""

    def _init_weights(self) -> None:
        own = torch.Generator().manual_seed(5)
        nn.init.trunc_normal_(self.first.weight, 5.0, 1.0, 4.0, 6.0, generator=own)
        nn.init.orthogonal_(self.second.weight, generator=own)
        nn.init.ones_(self.first.bias)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Scaled,
            r"no initialiser sets 'scale': give compile\(\) weights=PATH, give Scaled a reset",
        ),
        (Shrinking, "no initialiser sets 'scale'"),
        (Rotating, "no initialiser sets 'angles': give Rotating a reset_parameters"),
        (Failing, r"initialiser of 'the model' \(Failing\) fails .* \(no numbers left\)"),
    ],
)
def test_what_no_initialiser_sets(kind: Callable[[], nn.Module], message: str) -> None:
    with torch.device("meta"):
        model = kind()
    with pytest.raises(errors.StateError, match=message):
        drawn(model)


def unset() -> str:
    """What compiling raises where only the rank of stage 0 lacks an initialiser."""
    model = empty("gpt2")
    model.unread = nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(errors.StateError) as caught:
        compiled(model, 2)
    return str(caught.value)


@pytest.mark.slow
def test_one_ranks_error_is_everyones(gang: Callable[[int], Gang]) -> None:
    first, second = gang(2).run(unset)
    assert first == second
    assert "no initialiser sets 'unread'" in first


def test_a_module_under_two_names() -> None:
    with torch.device("meta"):
        model = Tiny()
        model.second = model.first
    assert list(drawn(model)) == ["first.weight", "first.bias"]


@pytest.mark.parametrize("kind", [Applying, Calling])
def test_a_models_own_scheme(kind: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        model = kind()
    whole = drawn(model)
    assert set(whole["first.bias"].tolist()) <= {1.0, 2.0}
    assert 4 < whole["first.weight"].min() < whole["first.weight"].max() < 6
    square = whole["second.weight"] @ whole["second.weight"].T
    assert torch.allclose(square, torch.eye(8), atol=1e-5)
    for name, tensor in whole.items():
        assert torch.equal(drawn(model, [name])[name], tensor)


class Mirrored(Tiny):
    """An initialiser that reads another tensor."""

    def reset_parameters(self) -> None:
        self.second.weight.copy_(self.first.weight.t())


@pytest.mark.parametrize("kind", [Applying, Calling, Mirrored])
def test_rows_are_those_of_whole_tensors(kind: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        model = kind()
    whole, skeleton = drawn(model), skeleton_of(model, CPU)
    source = Initializers(model, skeleton, 3)
    for replica in range(3):
        cuts = dict.fromkeys(whole, partial(rows_of, dp=3, replica=replica))
        for name, place in materialize(source, skeleton, {CPU: list(whole)}, cuts).items():
            assert torch.equal(place.held[CPU], rows_of(whole[name], 3, replica))
            assert place.digest == digest(whole[name].reshape(-1))


def test_samples_reach_from_the_first_to_the_last_element() -> None:
    for count in (1, 4096, 4097, 100_003):
        values = sample(torch.arange(count))
        assert len(values) <= 4096
        assert values[0] == 0
        assert values[-1] >= count - 64


# -- memory ------------------------------------------------------------------------------------


def held(skeleton: Skeleton, homes: dict[str, tuple[int, ...]], stages: set[int]) -> list[str]:
    names = dict.fromkeys(skeleton.canonical.values())
    return [name for name in names if stages.intersection(homes.get(name, stages))]


@pytest.mark.parametrize(
    ("files", "layers"), quickly([(True, 4)], [(True, 4), (True, 8), (False, 8)])
)
def test_no_rank_ever_holds_the_model(tmp_path: Path, files: bool, layers: int) -> None:
    config = {"num_hidden_layers": layers}
    real = models.llama(**config)
    total = sum(t.nbytes for t in real.state_dict().values())
    largest = max(t.nbytes for t in real.state_dict().values())
    with torch.device("meta"):
        model = models.llama(**config)
    weights = saved(real, tmp_path) if files else None
    pipe = compiled(model, 4, batch="llama", weights=weights)
    skeleton, homes = pipe._skeleton, pipe._session.state.homes
    del real
    for stages, share in [({0}, 0.4), ({1}, 0.4), ({2}, 0.4), ({3}, 0.4), ({0, 1, 2, 3}, 1.05)]:
        with RealMeter() as meter:
            made = materialize(
                source_of(model, skeleton, weights, 3, warn=False),
                skeleton,
                {CPU: held(skeleton, homes, stages)},
            )
        tensors = {name: allocation.held[CPU] for name, allocation in made.items()}
        mine = sum(tensor.nbytes for tensor in tensors.values())
        assert mine < share * total
        assert mine <= meter.peak_bytes <= mine + 4 * largest
        whole = pipe.state_dict()
        assert all(torch.equal(tensors[name], whole[name]) for name in tensors if name in homes)
