"""What Trainers are given besides: streams, workers, bf16, other tasks, adapters, model_init."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pipecompile.integrations.transformers import PipelineTrainer
from support import tasks
from torch import nn

from .test_trainer import assert_alike, trained

pytestmark = pytest.mark.filterwarnings("ignore:Bert.* takes .?num_items_in_batch")


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(tasks.rows_of("tokens", 40))


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=tasks.VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def adapted() -> Any:
    peft = pytest.importorskip("peft")
    model = tasks.model_of("causal")
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"])
    return peft.get_peft_model(model, config)


def trained_by(
    make: Any, folder: Path, task: str, model: Any, options: Any, given: Any, **pipeline: Any
) -> Any:
    args = tasks.arguments(folder, **{"max_steps": 4, "eval_steps": 2, "save_steps": 4} | options)
    rows = {
        "data_collator": tasks.collate,
        "train_dataset": tasks.rows_of(task, 22),
        "eval_dataset": tasks.rows_of(task, 9, seed=1),
    }
    made = make(model, args, **rows | given, **pipeline)
    made.train()
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "options", "given", "model"),
    [
        pytest.param("tokens", {"bf16": True}, {}, None, id="bf16"),
        pytest.param("tokens", {}, {"train_dataset": Stream()}, None, id="stream"),
        pytest.param("tokens", {"dataloader_num_workers": 1}, {}, None, id="workers"),
        pytest.param("causal", {}, {}, t5, id="seq2seq"),
        pytest.param("causal", {}, {}, adapted, id="adapters"),
        pytest.param("tokens", {}, {"model_init": lambda: tasks.model_of("tokens")}, 0, id="init"),
    ],
)
def test_it_trains_as_a_trainer_does(
    task: str, options: Any, given: Any, model: Any, tmp_path: Path
) -> None:
    made = []
    for make, more in (
        (transformers.Trainer, {}),
        (PipelineTrainer, {"pipeline": {"n_stages": 2}}),
    ):
        one = tasks.model_of(task) if model is None else model() if model else None
        folder = tmp_path / make.__name__
        made.append(trained_by(make, folder, task, one, options, given, **more))
    assert_alike(made[1], made[0])


@pytest.mark.slow
def test_replicas_share_a_stream(tmp_path: Path) -> None:
    """Each takes every other batch, as one device with twice the accumulation takes them."""
    options = {"max_steps": 4, "eval_steps": 2, "save_steps": 4}
    given = {"train_dataset": Stream()}
    twice = options | {"gradient_accumulation_steps": 4}
    theirs = trained(transformers.Trainer, "tokens", tmp_path / "one", twice, **given)
    pipeline = {"n_stages": 2, "dp": 2}
    mine = trained(
        PipelineTrainer, "tokens", tmp_path / "many", options, pipeline=pipeline, **given
    )
    assert_alike(mine, theirs, rel=1e-5, weights=1e-5)
