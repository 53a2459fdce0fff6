"""Adapters to peft's own files: what `PeftModel.from_pretrained` opens is what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pipecompile.compiler.cli.main import main
from pipecompile.runtime.files.index import read_index
from pipecompile.runtime.interchange.adapters import adapters_of
from safetensors.torch import load_file
from support import plain
from support.adapters import CONFIGS, adapted, base, batch, compiled, lora, peft, prompt
from support.checkpoints import edit
from support.matrix import quickly
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
STEP = "step-00000001"


try:
    check_peft_version(MIN_PEFT_VERSION)
    HAS_INJECTION = True
except ValueError:
    HAS_INJECTION = False


def train_and_save(model: nn.Module, folder: Path, n_stages: int = 2, **options: Any) -> Any:
    pipe = compiled(model, n_stages)
    pipe.step(batch(0))
    pipe.save(folder, **{"trainable_only": True} | options)
    return pipe


def exported(folder: Path, *options: str) -> Path:
    out = folder.with_name("out")
    assert main(["export", str(folder), str(out), *options]) == 0
    return out


def as_peft_writes_it(pipe: Any, model: Any, folder: Path) -> Path:
    pipe.load_into(model).save_pretrained(folder)
    return folder


def same_files(ours: Path, theirs: Path) -> None:
    mine, other = (dict(sorted(load_file(each / WEIGHTS).items())) for each in (ours, theirs))
    assert plain.equal(mine, other)
    assert told(ours) == told(theirs)


def told(folder: Path) -> dict[str, Any]:
    """An adapter's settings; peft keeps names as sets, whose order changes from run to run."""
    config = json.loads((folder / CONFIG).read_text())
    return {k: sorted(v) if k == "target_modules" else v for k, v in config.items()}


FURTHER = {
    "modules_to_save": lambda: lora(modules_to_save=["lm_head"]),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]
    ),
    "bias": lambda: lora(bias="all"),
    "embedding": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "no task": lambda: peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False),
    "vera": lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=2, target_modules=["o_proj"]),
}
METHODS = {**CONFIGS, **FURTHER}


@pytest.mark.filterwarnings("ignore")  # peft's, about what it saves
@pytest.mark.parametrize("name", quickly(["lora"], METHODS))
def test_the_files_are_those_that_peft_writes(name: str, tmp_path: Path) -> None:
    layers = 2 if name == "upper" else 1
    model = adapted(METHODS[name](), layers=layers)
    pipe = train_and_save(model, tmp_path / "run")
    out = exported(tmp_path / "run")
    same_files(
        out, as_peft_writes_it(pipe, adapted(METHODS[name](), layers=layers), tmp_path / "theirs")
    )
    opened = peft.PeftModel.from_pretrained(base(layers=layers), out)
    trained = pipe.load_into(model).eval()
    with torch.no_grad():
        assert torch.equal(opened(**batch(1)).logits, trained(**batch(1)).logits)


@pytest.mark.parametrize("whole", quickly([False], [False, True]))
def test_a_tied_base(whole: bool, tmp_path: Path) -> None:
    model = adapted(lora(), tied=True, layers=1)
    pipe = train_and_save(model, tmp_path / "run", trainable_only=not whole)
    out = exported(tmp_path / "run")
    same_files(
        out, as_peft_writes_it(pipe, adapted(lora(), tied=True, layers=1), tmp_path / "theirs")
    )


def test_several_adapters(tmp_path: Path) -> None:
    """The active one is trained; the other is frozen, and exported all the same."""
    model = adapted(lora(), layers=1)
    model.add_adapter("second", lora(r=2, target_modules=["k_proj"]))
    model.set_adapter("second")
    pipe = train_and_save(model, tmp_path / "run")
    theirs = as_peft_writes_it(pipe, model, tmp_path / "theirs")
    out = exported(tmp_path / "run")
    same_files(out, theirs)
    same_files(out / "second", theirs / "second")
    assert (
        main(["export", str(tmp_path / "run"), str(tmp_path / "one"), "--adapter", "second"]) == 0
    )
    same_files(tmp_path / "one", theirs / "second")
    assert not (tmp_path / "one" / "second").exists()


@pytest.mark.skipif(not HAS_INJECTION, reason="transformers asks for a later peft")
def test_adapters_that_transformers_injects(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = base()
    model.add_adapter(lora())
    pipe = train_and_save(model, tmp_path / "run")
    pipe.load_into(model).save_pretrained(tmp_path / "theirs")
    same_files(exported(tmp_path / "run"), tmp_path / "theirs")


def test_the_checkpoint_of_a_lora_run_is_small(tmp_path: Path) -> None:
    model = adapted(lora(), layers=1)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    own = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    train_and_save(model, tmp_path / "run")
    written = sum(p.stat().st_size for p in (tmp_path / "run" / STEP).glob("*.safetensors"))
    header = 200 * len(read_index(tmp_path / "run" / STEP).tensors)
    assert 3 * own <= written < 3 * own + header  # the adapters, and AdamW's two states
    assert written < whole


@pytest.mark.slow
def test_what_is_no_tensor_of_the_model_is_written_by_peft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts that a network makes of what is trained: peft computes them when it saves."""
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8
    )
    model = adapted(config, layers=1)
    pipe = train_and_save(model, tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "'prompt_embeddings' is computed when it is saved" in said
    assert "pipe.load_into(model)" in said
    other = compiled(adapted(config, layers=1), 1)
    other.step(batch(0))
    other.load(tmp_path / "run")
    as_peft_writes_it(other, model, tmp_path / "theirs")
    opened = peft.PeftModel.from_pretrained(base(layers=1), tmp_path / "theirs")
    with torch.no_grad():
        trained = pipe.load_into(model).eval()(**batch(1)).logits
        assert torch.allclose(opened(**batch(1)).logits, trained)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--shard-size", "1GB"], "--shard-size is of all weights"),
        (["--config", "hf:gpt2"], "--config is of all weights"),
        (["--adapter", "third"], "has no adapter 'third': it has 'default'"),
        (["--whole"], "saved with trainable_only=True and lacks"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_and_save(adapted(prompt(), layers=1), tmp_path / "run", n_stages=1)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), *options]) == 2
    assert says in capsys.readouterr().err


def test_all_weights_of_a_model_with_adapters(tmp_path: Path) -> None:
    model = adapted(lora(), layers=1)
    pipe = train_and_save(model, tmp_path / "run", n_stages=1, trainable_only=False)
    out = exported(tmp_path / "run", "--whole")
    assert plain.equal(
        dict(sorted(load_file(out / "model.safetensors").items())),
        dict(sorted(pipe.state_dict().items())),
    )


@pytest.mark.parametrize("name", quickly(["../away"], ["../away", "", ".hidden"]))
def test_a_name_that_leads_elsewhere_is_damage(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_and_save(adapted(prompt(), layers=1), tmp_path / "run", n_stages=1)

    def rename(fields: Any) -> None:
        fields["adapters"][name] = fields["adapters"].pop("default")

    edit(tmp_path / "run" / STEP, rename)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert f"{name!r} is no adapter's name" in capsys.readouterr().err
    assert not (tmp_path / "away").exists()


def test_looking_leaves_the_model_alone_and_asks_nobody() -> None:
    model = adapted(lora())
    config = model.peft_config["default"]
    config.base_model_name_or_path = "somebody/no-such-model"
    found = adapters_of(model)
    assert found is not None
    assert found["default"]["obstacle"] == ""
    assert found["default"]["config"]["base_model_name_or_path"] == "somebody/no-such-model"
    assert config.base_model_name_or_path == "somebody/no-such-model"
    assert config.inference_mode is False
    assert adapters_of(base()) is None


def test_a_vocabulary_of_another_size_is_saved(tmp_path: Path) -> None:
    """As peft does, which compares with the files of the base."""
    base(layers=1).save_pretrained(tmp_path / "base")
    model = type(base(layers=1)).from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(101)
    model = peft.get_peft_model(model, lora())
    train_and_save(model, tmp_path / "run", n_stages=1)
    names = load_file(exported(tmp_path / "run") / WEIGHTS).keys()
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} <= {
        *names
    }
