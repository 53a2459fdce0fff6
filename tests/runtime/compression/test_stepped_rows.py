"""The optimizer is given the rows of tables that a step touches, as a sparse gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
from pipecompile import errors
from support import jobs, models, plain, touching
from support.gang import Gang
from support.matrix import quickly

DIVISIONS = [(1, 1), (2, 2), (1, 3)]
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ONE_BY_ONE = partial(torch.optim.SGD, lr=0.1, foreach=False)


def sparse_steps(dp: int, steps: int, clips: float) -> tuple[Any, Any]:
    """One device: whole gradients are clipped, and those of tables are sparse for their optimizer;
    (state, what the optimizer keeps of words)."""
    model = touching.build()
    named = dict(model.named_parameters())
    words, places, rest = {"words.weight"}, {"places"}, named.keys() - {"words.weight", "places"}
    optimizers = [
        touching.LAZY([named[n] for n in words]),
        torch.optim.Adagrad([named[n] for n in places], lr=0.05),
        touching.ADAMW([named[n] for n in named if n in rest]),
    ]
    for batch in touching.batches(steps):
        for piece in plain.cut(batch, 2 * dp):
            (model(**piece) / (2 * dp)).backward()
        torch.nn.utils.clip_grad_norm_(list(model.parameters()), clips, foreach=False)
        for name in words | places:
            named[name].grad = named[name].grad.to_sparse(1)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return dict(model.state_dict()), optimizers[0].state[named["words.weight"]]


@pytest.mark.parametrize(("n_stages", "dp"), quickly([(1, 1), (2, 2)], DIVISIONS))
def test_plain_sgd_has_the_bits_of_whole_gradients(n_stages: int, dp: int) -> None:
    whole = touching.train("off", n_stages, dp)
    found = touching.train("step", n_stages, dp)
    assert plain.equal(found[:2], whole[:2])


def test_lazy_optimizers_are_those_of_one_device() -> None:
    """Clipped and over microbatches: momentum moves only the rows that a step touches."""
    state, kept = sparse_steps(1, 4, 0.5)
    found = touching.train("step", 2, 1, "lazy")
    assert plain.equal(found[1], state)
    assert plain.equal(found[2]["words.weight"], dict(sorted(kept.items())))
    dense = touching.train("exchange", 1, 2, "adamw")[1]
    begun = dict(touching.build().state_dict())["words.weight"]
    moved, all_moved = ((s["words.weight"] != begun).any(1).sum() for s in (state, dense))
    assert 0 < moved < all_moved == touching.WORDS - 1  # weight decay moves all but zeros


@pytest.mark.parametrize(("n_stages", "dp"), quickly([(2, 2)], [(2, 2), (1, 3)]))
def test_processes_have_the_bits_of_one_that_plays_them(
    gang: Callable[[int], Gang], n_stages: int, dp: int
) -> None:
    losses, state, kept, *_ = touching.train("step", n_stages, dp, "lazy")
    for mine in gang(n_stages * dp).run(touching.train, "step", n_stages, dp, "lazy"):
        assert plain.equal(mine[0], losses)
        assert plain.equal(mine[1], state)
        assert all(plain.equal(each, kept[name]) for name, each in mine[2].items())


def test_gradients_stay_whole_for_all_others() -> None:
    """Before the step and after it; a step of one's own pipe.optimizer is one like any other."""
    pipe, other = (touching.pipeline(rows) for rows in ("step", "off"))
    seen = []
    pipe.optimizer.register_step_pre_hook(
        lambda *_: seen.append({n: p.grad.is_sparse for n, p in pipe.named_parameters()})
    )
    for each in (pipe, other):
        each.forward_backward(touching.shares(each, 1)[0])
        each.clip_grad_value_(1e-3)
        each.optimizer.step()
    assert {name for name, sparse in seen[0].items() if sparse} == touching.TABLES
    assert plain.equal(touching.grads(pipe), touching.grads(other))
    assert plain.equal(pipe.state_dict(), other.state_dict())
    pipe.zero_grad()
    assert all(param.grad is None for param in pipe.parameters())


def test_an_optimizer_that_takes_sparse_gradients_of_some_is_given_those() -> None:
    chosen = pipecompile.Several(("words.*", touching.LAZY), ("*", touching.ADAMW))
    pipe = pipecompile.compile(
        touching.build(), 1, 2, optimizer=chosen, sparse_embeddings="step", costs="roofline"
    )
    pipe.step(touching.shares(pipe, 1)[0])
    said = dict(pipe.plan.notes)["sparse_embeddings"]
    assert said.endswith("the optimizer is given these alone of 'words.weight'")
    assert pipe.plan.stages[0].memory.states == sum(
        state.nbytes
        for kept in touching.states(pipe).values()
        for state in kept.values()
        if isinstance(state, torch.Tensor)
    )


def test_a_fp16_step_that_is_skipped_moves_no_row() -> None:
    pipe = touching.pipeline("step", 2, optimizer="lazy", precision="fp16")
    first, second = touching.shares(pipe, 2)
    pipe.step(first)
    before, kept = pipe.state_dict(), touching.states(pipe)
    pipe.loss_scaler.scale = 2.0**60
    pipe.step(second)
    assert pipe.loss_scaler.skipped == 1
    assert plain.equal(pipe.state_dict(), before)
    assert plain.equal(touching.states(pipe)["words.weight"], kept["words.weight"])


@pytest.mark.parametrize("optimizer", quickly(["lazy"], ["lazy", "plain sgd"]))
def test_a_resumed_run_has_the_bits_of_one_that_went_on(optimizer: str, tmp_path: Path) -> None:
    """Under other stages and replicas; evaluation between steps changes nothing."""
    pipe, again = (touching.pipeline("step", n, 2, optimizer) for n in (1, 2))
    for share in touching.shares(pipe, 2):
        pipe.step(share)
    pipe.save(tmp_path)
    assert again.load(tmp_path) == 2
    for each in (pipe, again):
        each.evaluate(touching.shares(each, 1)[0])
        for share in touching.shares(each, 2, 2):
            each.step(share)
    assert plain.equal(again.state_dict(), pipe.state_dict())
    assert plain.equal(touching.states(again), touching.states(pipe))


def test_what_compression_has_kept_of_tables_is_left_out_which_is_told(tmp_path: Path) -> None:
    before = touching.pipeline("off", compress="int8")
    before.step(touching.shares(before, 1)[0])
    before.save(tmp_path)
    pipe = touching.pipeline("exchange", compress="int8")
    with pytest.warns(UserWarning, match="had not sent of 'kinds.weight' yet, of which sparse_emb"):
        pipe.load(tmp_path)
    kept = before._require().state.compressed[0].residues["head.weight"]
    assert torch.equal(pipe._require().state.compressed[0].residues["head.weight"], kept)


# -- what does not go together --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dp": 1}, '"exchange" has no effect with dp=1'),
        ({"dp": 2, "zero": 1}, "zero=1 divides their rows: give zero=0"),
        ({"dp": 2, "zero": "auto"}, "zero='auto' divides"),
        ({"dp": 2, "training": False, "optimizer": None}, "no effect with training=False"),
        ({"sparse_embeddings": "step", "optimizer": None}, "no effect without optimizer="),
        ({"sparse_embeddings": "step", "verify": 1}, 'verify with "exchange"'),
        ({"sparse_embeddings": "rows"}, "use 'off' or 'exchange' or 'step'"),
    ],
)
def test_what_does_not_go_together_is_told_at_once(options: dict[str, Any], said: str) -> None:
    options = {"optimizer": jobs.SGD, "sparse_embeddings": "exchange"} | options
    with pytest.raises(errors.OptionError, match=said):
        pipecompile.compile(touching.build(), 1, **options)


def test_a_table_that_the_head_reads_too_is_none() -> None:
    """Of GPT-2 the places alone are one; frozen, none is."""
    gpt2 = models.build("gpt2")
    pipe = pipecompile.compile(
        gpt2, 1, 2, optimizer=jobs.SGD, sparse_embeddings="exchange", costs="roofline"
    )
    pipe.compile_for(models.batches("gpt2", 4, 1)[0])
    assert pipe._require().layout.tables == {"transformer.wpe.weight"}
    gpt2.transformer.wpe.requires_grad_(False)
    pipe = pipecompile.compile(gpt2, 1, 2, optimizer=jobs.SGD, sparse_embeddings="exchange")
    with pytest.raises(
        errors.OptionError,
        match=r"no effect on this model.*'transformer.wte.weight' is read by aten.* too in module "
        "'lm_head'",
    ):
        pipe.compile_for(models.batches("gpt2", 4, 1)[0])


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (touching.ADAMW, r"AdamW does not step 'words.weight' so \(RuntimeError: Adam does not"),
        (MOMENTUM, "SGD makes a sparse momentum_buffer of 'words.weight'"),
        (partial(ONE_BY_ONE, weight_decay=0.1), r"SGD does not step 'words.weight' so"),
    ],
)
def test_an_optimizer_that_takes_no_sparse_gradient_is_told(optimizer: Any, said: str) -> None:
    pipe = pipecompile.compile(touching.build(), 1, optimizer=optimizer, sparse_embeddings="step")
    with pytest.raises(errors.OptionError, match=said + r'.*Several\(\("words.weight", '):
        pipe.compile_for(touching.shares(pipe, 1)[0])
