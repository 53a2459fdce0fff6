"""Masks of the batch that mask nothing: transformers leaves them out, in each microbatch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pipecompile
import pytest
import torch
from support import jobs, token_steps
from support.gang import Gang
from support.token_steps import IGNORED, Batch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

LENGTH, VOCABULARY = 12, 64


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


class Looking(LlamaForCausalLM):
    """Looks at what it has computed, but where it is told that it is traced."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        if not torch.compiler.is_compiling():
            assert found.loss.item() > 0
        return found


def looking() -> nn.Module:
    return Looking(llama().config)  # type: ignore[arg-type]


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def batch(*pads: int) -> Batch:
    """Rows with so many tokens of padding at their end."""
    drawn = torch.Generator().manual_seed(sum(pads) + len(pads))
    ids = torch.randint(1, VOCABULARY, (len(pads), LENGTH), generator=drawn)
    mask = torch.tensor([[1] * (LENGTH - pad) + [0] * pad for pad in pads])
    labels = torch.where(mask.bool(), ids, IGNORED)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def rows(whole: Batch, start: int, end: int) -> Batch:
    return {key: value[start:end] for key, value in whole.items()}


def plainly(model: nn.Module, optimizer: torch.optim.Optimizer, whole: Batch, pieces: int) -> None:
    token_steps.step(model, optimizer, whole, pieces, int(isinstance(model, LlamaForCausalLM)))


def unequal(pipe: Any, model: nn.Module) -> list[str]:
    state = pipe.state_dict()
    return [n for n, each in model.state_dict().items() if not torch.equal(state[n], each)]


BATCHES = (
    (0, 0, 0, 0),
    (0, 0, 3, 5),  # with padding in one microbatch alone
    (1, 2, 3, 4),
    (5, 3, 0, 0),
)


@pytest.mark.parametrize(
    "make", [llama, *(pytest.param(each, marks=pytest.mark.slow) for each in (looking, bert))]
)
def test_microbatches_with_and_without_padding_share_a_step(make: Callable[[], nn.Module]) -> None:
    model = make()
    optimize = jobs.OPTIMIZERS["adamw"]
    pipe = pipecompile.compile(copy.deepcopy(model), 2, microbatches=2, optimizer=optimize)
    optimizer = optimize(model.parameters())
    for pads in BATCHES:
        pipe.step(batch(*pads))
        plainly(model, optimizer, batch(*pads), 2)
        assert not unequal(pipe, model), pads
    assert len(pipe._session.loaded) == 2


def test_a_program_without_padding_has_no_mask() -> None:
    pipe = pipecompile.compile(llama(), 1, optimizer=jobs.OPTIMIZERS["adamw"])
    pipe.step(batch(0, 0))
    pipe.step(batch(0, 1))
    kernel = "scaled_dot_product"
    masked = [
        any(
            "attn_mask" in node.kwargs
            for node in made.compiled.program.stages[0].parts["F"].module.graph.nodes
            if kernel in str(node.target)
        )
        for made in pipe._session.loaded.values()
    ]
    assert masked == [False, True]


def in_processes(n_stages: int, dp: int) -> tuple[list[str], list[bool]]:
    """What differs from one device after each batch; whether this process has to be given it."""
    model = llama()
    optimize = jobs.OPTIMIZERS["adamw"]
    pipe = pipecompile.compile(
        copy.deepcopy(model), n_stages, dp=dp, microbatches=1, optimizer=optimize
    )
    optimizer = optimize(model.parameters())
    found, given = [], []
    for pads in BATCHES:
        whole, share = batch(*pads), len(pads) // dp
        mine = rows(whole, pipe.data_shard * share, (pipe.data_shard + 1) * share)
        given.append(pipe.needs_data)
        pipe.step(mine)
        plainly(model, optimizer, whole, dp)
        found += unequal(pipe, model)
    return found, given


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 3])
def test_replicas_may_differ(gang: Callable[[int], Gang], stages: int) -> None:
    heard = gang(stages * 2).run(in_processes, stages, 2)
    assert all(not found for found, _ in heard)
    assert all(all(given) for _, given in heard)  # a mask may be read on any stage
