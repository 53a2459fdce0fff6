"""Which architectures there are: families, and the model types of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.errors import OptionError, SpecError

TORCH = "torch"  # models that are written with torch.nn alone

# task -> transformers' table of model classes by model type, and the auto class that makes one
TASKS = {
    "seq2seq-lm": ("SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM"),
    "masked-lm": ("MASKED_LM", "AutoModelForMaskedLM"),
    "causal-lm": ("CAUSAL_LM", "AutoModelForCausalLM"),
    "image-classification": ("IMAGE_CLASSIFICATION", "AutoModelForImageClassification"),
    "sequence-classification": ("SEQUENCE_CLASSIFICATION", "AutoModelForSequenceClassification"),
}

FAMILIES = (
    "causal-lm",
    "seq2seq-lm",
    "masked-lm",
    "sequence-classification",
    "image-classification",
    TORCH,
)
"""In the order in which they are tried."""


@dataclass(frozen=True, order=True)
class Architecture:
    """A model type in one of its tasks."""

    family: str
    name: str

    def __str__(self) -> str:
        return f"{self.family}/{self.name}"


def class_tables() -> dict[str, Mapping[str, Any]]:
    """Task -> model type -> name of its class, or names.

    Raises:
        SpecError: transformers is not installed.
    """
    try:
        import transformers  # noqa: F401  a part of it may be there without it
        from transformers.models.auto import modeling_auto
    except ImportError as error:
        raise SpecError(
            f"transformers is needed ({error}): pip install 'pipecompile[hf]'"
        ) from error
    return {
        task: getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")
        for task, (table, _) in TASKS.items()
    }


def architectures(families: Sequence[str], only: Sequence[str] = ()) -> list[Architecture]:
    """All of some families, or those with the names.

    Args:
        families: none for all.
        only: ``gpt2`` for it in each family, ``causal-lm/gpt2`` for one.

    Raises:
        OptionError: there is none of such a name.
        SpecError: transformers is not installed.
    """
    from .plain_models import MODELS

    tables = class_tables() | {TORCH: MODELS}
    found = [
        Architecture(family, name)
        for family in FAMILIES
        if family in (families or FAMILIES)
        for name in tables[family]
    ]
    for wanted in only:
        if not any(wanted in (each.name, str(each)) for each in found):
            raise OptionError(f"--only {wanted}: there is no such architecture in these families")
    return [each for each in found if not only or {each.name, str(each)} & set(only)]
