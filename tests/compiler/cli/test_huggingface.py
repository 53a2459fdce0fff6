"""Checkpoints to Hugging Face's files and back, by the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pipecompile
import pytest
import torch
import transformers as hf
from pipecompile import errors
from pipecompile.compiler.cli.main import main
from support import jobs, models
from support.matrix import quickly
from support.plain import equal
from torch import nn

MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "gpt2": (partial(models.gpt2, n_layer=1), hf.GPT2LMHeadModel),
    "gpt2 untied": (
        partial(models.gpt2, n_layer=1, tie_word_embeddings=False),
        hf.GPT2LMHeadModel,
    ),
    "llama": (partial(models.llama, num_hidden_layers=1), hf.AutoModelForCausalLM),
    "llama tied": (
        partial(models.llama, num_hidden_layers=1, tie_word_embeddings=True),
        hf.AutoModelForCausalLM,
    ),
    "bart": (models.bart, hf.BartForConditionalGeneration),
    "bert-mlm": (models.bert_mlm, hf.BertForMaskedLM),
}


def pipeline(build: Callable[[], nn.Module], seed: int, n_stages: int = 2) -> Any:
    torch.manual_seed(seed)
    model = build()
    torch.manual_seed(1)
    return pipecompile.compile(
        model,
        n_stages,
        microbatches=2,
        optimizer=jobs.OPTIMIZERS["adamw"],
        example_batch=models.padded(4),
    )


def from_pretrained(auto: Any, folder: Path) -> nn.Module:
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


@pytest.mark.parametrize("name", quickly(["llama tied"], MODELS))
def test_out_and_back(tmp_path: Path, name: str) -> None:
    build, auto = MODELS[name]
    pipe = pipeline(build, 0)
    pipe.step(models.padded(4))
    pipe.save(tmp_path / "run")
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    model = from_pretrained(auto, out)
    assert equal(dict(model.state_dict()), pipe.state_dict())
    assert model.config.use_cache
    model.save_pretrained(tmp_path / "theirs")
    assert set(_names(out)) == set(_names(tmp_path / "theirs"))
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "anew")]) == 0
    other = pipeline(build, 7, n_stages=1)
    other.step(models.padded(4))
    assert other.load(tmp_path / "anew") == 0
    assert equal(other.state_dict(), pipe.state_dict())
    assert not other.optimizer.state
    assert main(["export", str(tmp_path / "anew"), str(tmp_path / "again")]) == 0
    assert equal(dict(from_pretrained(auto, tmp_path / "again").state_dict()), pipe.state_dict())


def _names(folder: Path) -> list[str]:
    header = (folder / "model.safetensors").read_bytes()
    return list(json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]))


def test_shards_with_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = pipeline(partial(models.llama, num_hidden_layers=1), 0)
    pipe.save(tmp_path / "run")
    out = tmp_path / "out"
    command = ["export", str(tmp_path / "run"), str(out), "--shard-size", "20KB"]
    assert main(command) == 0
    parts = sorted(out.glob("model-*.safetensors"))
    assert len(parts) > 2
    assert all(part.stat().st_size < 25_000 for part in parts)
    assert str(parts[0]) in capsys.readouterr().out
    model = from_pretrained(hf.LlamaForCausalLM, out)
    assert equal(dict(model.state_dict()), pipe.state_dict())
    assert main(["import", str(out), str(tmp_path / "anew")]) == 0
    before = pipe.state_dict()
    pipe.step(models.padded(4))
    pipe.load(tmp_path / "anew")
    assert equal(pipe.state_dict(), before)


@pytest.mark.slow
def test_low_precision_opens_as_it_is(tmp_path: Path) -> None:
    pipe = pipeline(lambda: models.llama(num_hidden_layers=1).to(torch.bfloat16), 0)
    pipe.save(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    model = from_pretrained(hf.LlamaForCausalLM, tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert equal(dict(model.state_dict()), pipe.state_dict())


def test_a_configuration_given(tmp_path: Path) -> None:
    pipe = pipecompile.compile(nn.Linear(4, 4), 1, example_batch=torch.ones(2, 4), loss_fn=_mean)
    pipe.save(tmp_path / "run")
    run = str(tmp_path / "run")
    (tmp_path / "mine.json").write_text('{"model_type": "llama"}')
    for number, config in enumerate(([], ["--config", f"{tmp_path}/mine.json"])):
        assert main(["export", run, str(tmp_path / str(number)), *config]) == 0
    assert not (tmp_path / "0" / "config.json").exists()
    made = json.loads((tmp_path / "1" / "config.json").read_text())
    assert made == {"model_type": "llama", "dtype": "float32"}
    assert main(["export", run, str(tmp_path / "2"), "--config", "hf:gpt2"]) == 0
    made = json.loads((tmp_path / "2" / "config.json").read_text())
    assert made["architectures"] == ["GPT2LMHeadModel"]


def _mean(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return output.mean()


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(*command: Any) -> str:
        assert main([str(part) for part in command]) == 2
        return capsys.readouterr().err

    pipe = pipeline(partial(models.gpt2, n_layer=1), 0)
    run = tmp_path / "run"
    pipe.save(run)
    assert "there is no folder" in message("export", tmp_path / "nothing", tmp_path / "out")
    assert "is not an empty folder: give another OUT" in message("export", run, run)
    assert "--shard-size='x': give bytes" in message("export", run, tmp_path, "--shard-size", "x")
    lost = ("export", run, tmp_path / "out", "--config", "lost.json")
    assert "lost.json cannot be read" in message(*lost)
    assert "has neither model.safetensors nor" in message("import", run, tmp_path / "new")
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    assert "cannot be read" in message("import", tmp_path, tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())
    assert "has checkpoints already" in message("import", tmp_path, run)
    outside = {"weight_map": {"a": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(outside))
    assert "it names no files beside it" in message("import", tmp_path, tmp_path / "new")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.slow
def test_weights_of_another_model(tmp_path: Path) -> None:
    models.gpt2().save_pretrained(tmp_path / "theirs")
    main(["import", str(tmp_path / "theirs"), str(tmp_path / "run")])
    with pytest.raises(errors.CheckpointError, match=r"'model.embed_tokens.weight' is missing"):
        pipeline(models.llama, 0).load(tmp_path / "run")
