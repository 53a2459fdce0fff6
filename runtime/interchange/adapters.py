"""What a checkpoint keeps of peft's adapters, so that they can be exported without the model.

peft's files name tensors in a way of each method's own. Which tensor of the model is which is told
by peft itself: its state dict is made of the model's tensors, and those in it are looked up.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...compiler.capture.whole import model_of
from ...compiler.ir.errors import CheckpointError
from ..files.index import Index

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_INSIDE = "base_model.model."
"""What the names in peft's files begin with; of a model that has its adapters injected, not yet."""
_READ = ("PROMPT_TUNING", "PREFIX_TUNING")  # whose prompts are an embedding's rows as they are


@dataclass(frozen=True)
class Adapter:
    """One of a model's adapters.

    Attributes:
        config: what ``adapter_config.json`` says.
        tensors: name in ``adapter_model.safetensors`` -> name in the model that was trained.
        obstacle: why the names are not known; "" if they are.
    """

    config: dict[str, Any]
    tensors: dict[str, str]
    obstacle: str = ""


def adapters_of(model: nn.Module) -> dict[str, Any] | None:
    """Name -> `Adapter` as JSON data; None for a model without any."""
    model = model_of(model)
    configs = getattr(model, "peft_config", None)
    if "peft" not in sys.modules or not isinstance(configs, Mapping) or not configs:
        return None
    found = {}
    for name in configs:
        try:
            made = Adapter(_config(model, name), _tensors(model, name))
        except Exception as error:  # of a method that is saved in a way of its own
            made = Adapter({}, {}, f"{type(error).__name__}: {error}")
        found[name] = vars(made)
    return found


def adapters_in(index: Index) -> dict[str, Adapter]:
    """Those of the model that was saved.

    Raises:
        CheckpointError: what is said of them is none.
    """
    found = {}
    for name, each in (index.adapters or {}).items():
        try:
            made = Adapter(dict(each["config"]), dict(each["tensors"]), str(each["obstacle"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint is damaged: what it says of the adapter {name!r} is no table"
            ) from error
        texts = all(isinstance(text, str) for pair in made.tensors.items() for text in pair)
        if not name or Path(name).name != name or name.startswith(".") or not texts:
            raise CheckpointError(f"the checkpoint is damaged: {name!r} is no adapter's name")
        found[name] = made
    return found


def _tensors(model: nn.Module, adapter: str) -> dict[str, str]:
    from peft import PeftModel, get_peft_model_state_dict

    held = model.state_dict(keep_vars=True)
    names: dict[int, str] = {}
    for name, tensor in held.items():
        names.setdefault(id(tensor), name)
    embeddings: Any = True if _resized(model, adapter) else "auto"
    with _as_it_is_saved(model, adapter), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = get_peft_model_state_dict(model, held, adapter, save_embedding_layers=embeddings)
    if made := [name for name, tensor in saved.items() if id(tensor) not in names]:
        raise ValueError(f"{made[0]!r} is computed when it is saved")
    prefix = "" if isinstance(model, PeftModel) else _INSIDE
    return {prefix + name: names[id(tensor)] for name, tensor in saved.items()}


@contextmanager
def _as_it_is_saved(model: Any, adapter: str) -> Iterator[None]:
    """Inside, peft names an embedding of prompts instead of reading its rows, and asks no hub."""
    config = model.peft_config[adapter]
    kept = config.inference_mode, config.base_model_name_or_path
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning and kind in _READ:
        inside = {name for name, _ in model.prompt_encoder[adapter].named_parameters()}
        config.inference_mode = inside == {"embedding.weight"}
    config.base_model_name_or_path = None
    try:
        yield
    finally:
        config.inference_mode, config.base_model_name_or_path = kept


def _resized(model: Any, adapter: str) -> bool:
    """Whether the base has another vocabulary than its files say, which peft then saves too."""
    source = model.peft_config[adapter].base_model_name_or_path
    config: Any = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if not source or not size or not hasattr(type(config), "from_pretrained"):
        return False
    try:
        there = type(config).from_pretrained(source, local_files_only=True)
    except Exception:  # not on this machine, as far as anybody knows
        return False
    return bool(there.vocab_size != size)


def _config(model: Any, adapter: str) -> dict[str, Any]:
    """What peft writes beside the weights."""
    from peft import PeftModel

    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    mapping = None
    if isinstance(model, PeftModel):
        base = model.get_base_model()
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = vars(base).get("name_or_path") or None
        if config.task_type is None:
            mapping = {"base_model_class": type(base).__name__}
            mapping["parent_library"] = type(base).__module__
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder, auto_mapping_dict=mapping)
        fields: dict[str, Any] = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    return fields
