"""Losses that a Trainer computes outside of the model, as ``loss_fn=`` of a pipeline.

They hold nothing of the Trainer: a pipeline knows its loss again by what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.operations import convert_to_fp32
from torch import nn

LABELS, ITEMS = "trainer_labels", "trainer_num_items"
"""Of batches whose loss is computed outside of the model, which must not see them."""


@dataclass(frozen=True)
class Loss:
    """Attributes:
    function: (outputs, labels, num_items_in_batch=...) -> a loss.
    reduced: the model computes in a narrower dtype than fp32; outputs become fp32, as
        accelerate has them.
    """

    function: Callable[..., torch.Tensor]
    reduced: bool

    def __call__(self, output: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        outputs = convert_to_fp32(output) if self.reduced else output
        return self.function(outputs, batch[LABELS], num_items_in_batch=batch.get(ITEMS))


@dataclass(frozen=True)
class Smoothed:
    """``label_smoothing_factor``, as the Trainer's `compute_loss` has it.

    Attributes:
        smoother: a `LabelSmoother` of transformers.
        shifts: each token's label is that of the next one.
    """

    smoother: Callable[..., torch.Tensor]
    shifts: bool

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        options = {"shift_labels": True} if self.shifts else {}
        items = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return self.smoother(outputs, labels, **options, **items)


def is_causal(model: nn.Module) -> bool:
    """Whether the Trainer takes a model for one whose losses are of the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    base: Any = getattr(model, "base_model", None)
    inner = getattr(base, "model", model) if hasattr(model, "peft_config") else model
    return type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
