"""The trained model back: into a plain one, on one rank alone, or piece by piece."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile.compiler.memory.meter import StorageMeter
from pipecompile.errors import RankMismatchError, StateError
from support import jobs, models, plain
from support.gang import Gang
from support.matrix import quickly
from torch import nn


def trained(n_stages: int, dp: int, name: str = "gpt2", **options: Any) -> Any:
    pipe = jobs.pipeline(name, n_stages, dp, 2, **options)
    for batch in models.batches(name, 4 * dp, 2):
        pipe.step(plain.cut(batch, pipe.data_shards)[pipe.data_shard])
    return pipe


# -- into a model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quickly(["gpt2"], ["gpt2", "bart", "bert-mlm", "mixtral"]))
def test_a_plain_model_takes_all_of_it(name: str) -> None:
    """Tied weights stay tied, and what comes back is the model that was given."""
    pipe, model = trained(2, 1, name), models.build(name, seed=7)
    before = {n: id(p) for n, p in model.named_parameters()}
    assert pipe.load_into(model) is model
    assert plain.equal(dict(model.state_dict()), pipe.state_dict())
    assert {n: id(p) for n, p in model.named_parameters()} == before


def test_generate_is_a_line_away() -> None:
    pipe = trained(3, 1)
    other = models.build("gpt2", seed=9)
    other.load_state_dict(pipe.state_dict())
    prompt = models.tokens(1)["input_ids"][:, :4]
    say = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = pipe.load_into(models.build("gpt2")).eval().generate(prompt, **say)
    assert torch.equal(found, other.eval().generate(prompt, **say))


def test_the_model_that_was_compiled_may_be_it() -> None:
    """And the pipeline trains on as if nothing had happened."""
    model = models.build("gpt2")
    pipes = [jobs.pipeline("gpt2", 2, 1, 2)]
    pipes.append(pipecompile.compile(model, 2, microbatches=2, optimizer=jobs.OPTIMIZERS["adamw"]))
    for batch in models.batches("gpt2", 4, 3):
        for pipe in pipes:
            pipe.step(batch)
        pipes[1].load_into(model)
        assert plain.equal(dict(model.state_dict()), pipes[0].state_dict())


def test_values_are_rounded_to_the_models_dtype() -> None:
    pipe = trained(2, 1)
    model = pipe.load_into(models.build("gpt2").to(torch.bfloat16))
    for name, value in pipe.state_dict().items():
        held = model.state_dict()[name]
        assert held.dtype is torch.bfloat16
        assert torch.equal(held, value.to(torch.bfloat16))


class Extra(nn.Module):
    """Has buffers of both kinds, and state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lin, self.said = nn.BatchNorm1d(4), nn.Linear(4, 1), "nothing"
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def get_extra_state(self) -> dict[str, str]:
        return {"said": self.said}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.said = state["said"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.norm(x)).square().mean() + self.scratch.sum()


@pytest.mark.filterwarnings("ignore:.*rows")
def test_buffers_and_extra_state() -> None:
    model, plainly = Extra(), Extra()
    model.said = "something"
    pipe = pipecompile.compile(model, 2, microbatches=2, optimizer=jobs.SGD)
    pipe.step(torch.randn(8, 4))
    plainly.scratch += 5
    pipe.load_into(plainly)
    assert plain.equal(dict(plainly.state_dict()), pipe.state_dict())
    assert plainly.norm.num_batches_tracked == 2
    assert plainly.said == "something"
    assert plainly.scratch.tolist() == [5, 5]  # no state dict has it


def untied() -> nn.Module:
    return models.gpt2(tie_word_embeddings=False)


def renamed() -> nn.Module:
    model = models.gpt2()
    model.more = nn.Linear(2, 2)
    return model


def meta() -> nn.Module:
    with torch.device("meta"):
        return models.gpt2()


def inferring() -> nn.Module:
    with torch.inference_mode():
        return models.gpt2()


def counting() -> nn.Module:
    model = models.gpt2()
    model.transformer.ln_f.bias = nn.Parameter(torch.zeros(32).int(), requires_grad=False)
    return model


class Wrapped(torch.Tensor):
    pass


def subclassed() -> nn.Module:
    model = models.gpt2()
    model.transformer.ln_f.bias = nn.Parameter(torch.zeros(32).as_subclass(Wrapped))
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (renamed, r"missing \[\], unexpected \['more.weight'"),
        (partial(models.gpt2, n_layer=1), r"missing \['transformer.h.1"),
        (partial(models.gpt2, vocab_size=40), r"'transformer.wte.weight' has shape \[40, "),
        (meta, r"on the meta device.*to_empty"),
        (inferring, r"inference_mode"),
        (counting, r"is int32 in the model and float32 in the pipeline"),
        (subclassed, r"is a Wrapped in the model"),
        (lambda: "gpt2", r"was given a str: give a model, or None"),
        (lambda: None, r"None on every rank"),
    ],
)
def test_a_model_that_differs(build: Any, message: str) -> None:
    pipe, model = trained(2, 1), build()
    with pytest.raises(StateError, match=message):
        pipe.load_into(model)


@pytest.mark.slow
def test_a_model_that_ties_what_the_pipeline_does_not() -> None:
    pipe = pipecompile.compile(untied(), 2, microbatches=2, optimizer=jobs.SGD)
    pipe.step(models.tokens(4))
    with pytest.raises(StateError, match=r"one tensor in the model and two in the pipeline"):
        pipe.load_into(models.gpt2())
    tied = trained(2, 1)
    model = tied.load_into(untied())  # the other way round there is a value for each
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)


def into_one(n_stages: int, dp: int, zero: int, chosen: tuple[int, ...]) -> Any:
    pipe = trained(n_stages, dp, zero=zero)
    rank = 0 if pipe.is_main else 1
    given = models.build("gpt2", seed=3) if rank in chosen else None
    model = pipe.load_into(given)
    assert model is given
    return None if model is None else dict(model.state_dict()), pipe.state_dict()


@pytest.mark.parametrize(
    ("n_stages", "dp", "zero"),
    quickly([(1, 2, 3)], [(2, 1, 0), (1, 2, 0), (1, 2, 1), (1, 2, 2), (1, 2, 3)]),
)
def test_the_ranks_that_have_a_model_get_it(
    gang: Callable[[int], Gang], n_stages: int, dp: int, zero: int
) -> None:
    for chosen in ((0,), (1,), (0, 1)):
        for rank, (found, state) in enumerate(gang(2).run(into_one, n_stages, dp, zero, chosen)):
            assert (found is not None) == (rank in chosen)
            assert found is None or plain.equal(found, state)


def wrong_on_one() -> tuple[str, bool]:
    pipe = trained(2, 1)
    model = models.gpt2() if pipe.is_main else models.gpt2(n_layer=1)
    before = copy.deepcopy(model.state_dict())
    try:
        pipe.load_into(model)
    except StateError as error:
        return str(error), plain.equal(dict(model.state_dict()), dict(before))
    return "", False


def test_one_that_differs_on_one_rank_changes_none(gang: Callable[[int], Gang]) -> None:
    for message, same in gang(2).run(wrong_on_one):
        assert "missing ['transformer.h.1" in message
        assert same


# -- state dicts -----------------------------------------------------------------------------------


def pieces(n_stages: int, dp: int, **options: Any) -> Any:
    pipe = trained(n_stages, dp, **options)
    every, mine = dict(pipe.iter_state_dict()), dict(pipe.iter_state_dict(rank0_only=True))
    return pipe.state_dict(), pipe.state_dict(rank0_only=True), every, mine


def test_all_at_once_or_one_by_one() -> None:
    state, alone, every, mine = pieces(2, 1)
    assert list(alone) == list(state)
    for found in (alone, every, mine):
        assert plain.equal(sorted(found.items()), sorted(state.items()))


@pytest.mark.parametrize(
    ("n_stages", "dp", "zero"), quickly([(2, 1, 0)], [(2, 1, 0), (1, 2, 0), (1, 2, 1), (1, 2, 3)])
)
def test_rank_0_alone(gang: Callable[[int], Gang], n_stages: int, dp: int, zero: int) -> None:
    found = gang(2).run(pieces, n_stages, dp, zero=zero)
    for rank, (state, alone, every, mine) in enumerate(found):
        assert plain.equal(sorted(every.items()), sorted(state.items()))
        assert plain.equal(alone, {} if rank else state)
        assert plain.equal(sorted(mine.items()), [] if rank else sorted(state.items()))


def test_names_that_are_one_tensor_follow_each_other() -> None:
    seen = [name for name, _ in trained(2, 1).iter_state_dict()]
    at = seen.index("transformer.wte.weight")
    assert seen[at + 1] == "lm_head.weight"
    assert sorted(seen) == sorted(models.gpt2().state_dict())


def test_training_in_between_is_an_error() -> None:
    pipe = trained(2, 1)
    pairs: Iterator[Any] = pipe.iter_state_dict()
    assert [next(pairs)[0], next(pairs)[0]] == ["transformer.wte.weight", "lm_head.weight"]
    pipe.step(models.batches("gpt2", 4, 1)[0])
    with pytest.raises(StateError, match="between two steps"):
        next(pairs)


def left() -> str:
    """Rank 1 leaves the loop after its first pass."""
    pipe = trained(2, 1)
    try:
        for _ in pipe.iter_state_dict():
            if not pipe.is_main:
                break
        pipe.step(models.batches("gpt2", 4, 1)[0])
    except RankMismatchError as error:
        return str(error)
    return ""


def test_a_rank_that_leaves_the_loop_is_named(gang: Callable[[int], Gang]) -> None:
    for message in gang(2).run(left):
        assert "rank 0 is in iter_state_dict() (call 4) and rank 1 in step() (call 4)" in message


# -- memory ----------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Square layers."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def wide(layers: int, width: int, n_stages: int = 2, dp: int = 1, **options: Any) -> Any:
    """No process ever has all of the model that it is made of."""
    with torch.device("meta"):
        empty = Wide(layers, width)
    x = torch.zeros(2, width)
    return pipecompile.compile(
        empty, n_stages, dp, microbatches=1, seed=0, example_batch=x, **options
    )


def passed(pipe: Any, rank0_only: bool) -> None:
    for _ in pipe.iter_state_dict(rank0_only=rank0_only):
        pass


def allocated(layers: int, width: int, n_stages: int, dp: int, **options: Any) -> list[float]:
    """What each call has at most at once, in layers."""
    pipe, found = wide(layers, width, n_stages, dp, **options), []
    plainly = Wide(layers, width) if pipe.is_main else None
    for act in (
        lambda: passed(pipe, False),
        lambda: passed(pipe, True),
        lambda: pipe.load_into(plainly),
        lambda: pipe.state_dict(rank0_only=True),
        pipe.state_dict,
    ):
        with StorageMeter() as meter:
            act()
        found.append(round(meter.peak_bytes / (4 * width * width), 1))
    return found


@pytest.mark.parametrize(
    ("n_stages", "dp", "zero"), quickly([(2, 1, 0), (1, 2, 3)], [(2, 1, 0), (1, 2, 3), (1, 2, 1)])
)
def test_one_piece_at_a_time(
    gang: Callable[[int], Gang], n_stages: int, dp: int, zero: int
) -> None:
    """Of eight; the one before may still be with who asked for it, and each of gloo's two threads
    lets go of what it has broadcast a moment after the call has returned. Ranks that get nothing
    have no more than they had."""
    main, other = gang(2).run(allocated, 8, 256, n_stages, dp, zero=zero, optimizer=jobs.SGD)
    for streamed, *_, every in (main, other):
        assert streamed <= 4.0
        assert every >= 8
    assert main[1] <= 2.5  # rows of the next are on their way, and no thread
    assert main[2] <= 2.0  # one, and rows of it
    assert main[3] >= 8
    assert other[1:4] == [0.0, 0.0, 0.0]


def status(key: str) -> int:
    """Bytes of this process."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def grown(streamed: bool) -> float:
    """MiB by which this process has grown at most, of a model of 256 MiB."""
    pipe = wide(64, 1024)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    passed(pipe, True) if streamed else pipe.state_dict()
    return (status("VmHWM") - before) / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells peaks")
@pytest.mark.parametrize("streamed", [True, False])
def test_what_the_kernel_sees(streamed: bool) -> None:
    fresh = Gang(2)  # others have room left of what they have done before
    try:
        found = fresh.run(grown, streamed)
    finally:
        fresh.close()
    assert all(each < 64 if streamed else each > 200 for each in found), found
