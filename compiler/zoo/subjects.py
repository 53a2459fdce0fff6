"""An architecture -> a tiny model of it, and batches for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import shrink
from .families import TORCH, Architecture, class_tables
from .plain_models import MODELS
from .shrink import shrunk
from .special import FIELDS, LENGTHS

LENGTH = 16  # tokens per row
ROWS = 4
FIRST_WORD = 5  # smaller tokens begin, end and pad
LABELS = 3

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A model and what makes a batch for it; both draw from torch's generator."""

    model: nn.Module
    batch: Callable[[], Batch]


def subject_of(architecture: Architecture) -> Subject:
    """Raises whatever transformers raises for what it cannot build."""
    if architecture.family == TORCH:
        make, batch = MODELS[architecture.name]
        return Subject(make(), lambda: batch(ROWS))
    import transformers

    config = config_of(architecture)
    names = class_tables()[architecture.family][architecture.name]
    kind = getattr(transformers, names if isinstance(names, str) else names[0])
    text = config.get_text_config(decoder=True)
    if not isinstance(config, kind.config_class) and isinstance(text, kind.config_class):
        config = text  # of an architecture that reads images too
    model = kind(config)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0  # some architectures have constants for it
    return Subject(model, lambda: _batch(model, config, architecture))


def config_of(architecture: Architecture) -> Any:
    """The tiny configuration, with what the task needs."""
    import transformers

    family, name = architecture.family, architecture.name
    base = transformers.CONFIG_MAPPING[name]()
    config = shrunk(base, FIELDS.get(name))
    text = config.get_text_config(decoder=True)
    if family == "causal-lm" and not config.is_encoder_decoder and hasattr(config, "is_decoder"):
        config.is_decoder = True
    for each in (config, text):
        if getattr(each, "pad_token_id", None) is None:
            each.pad_token_id = 0
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    if family.endswith("classification"):
        config.num_labels = LABELS
    return config


def _batch(model: nn.Module, config: Any, architecture: Architecture) -> Batch:
    labels = torch.randint(0, LABELS, (ROWS,))
    takes = inspect.signature(model.forward).parameters
    if architecture.family == "image-classification" and "pixel_values" in takes:
        size = getattr(config, "image_size", None) or 32
        height, width = (size, size) if isinstance(size, int) else size
        images = torch.randn(ROWS, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": images, "labels": labels}
    name = "input_ids" if "input_ids" in takes else str(model.main_input_name)
    length = LENGTHS.get(architecture.name, LENGTH)
    tokens = torch.randint(FIRST_WORD, shrink.FIRST_SPECIAL, (ROWS, length))
    if architecture.family.endswith("classification"):
        end = getattr(config, "eos_token_id", None)
        tokens[:, -1] = end if isinstance(end, int) else 2
        return {name: tokens, "labels": labels}
    return {name: tokens, "labels": tokens.clone()}
