"""Models that take num_items_in_batch and do not read it: a Trainer adds their means up."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from torch import nn

_UNREAD = "takes 'num_items_in_batch' as **kwargs and reads none of it"

# It is the Trainer that gives it to every model that can take it, in each program.
warnings.filterwarnings("ignore", r".* takes 'num_items_in_batch' as \*\*kwargs and reads none")


@contextlib.contextmanager
def told_unread(model: nn.Module, batches: int) -> Iterator[None]:
    """Where the model is compiled inside: warns of what that means for several batches."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for each in caught:
        if _UNREAD not in str(each.message):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
        elif batches > 1:
            warnings.warn(
                f"{type(model).__name__} takes num_items_in_batch and does not read it, so that "
                f"Trainer, and PipelineTrainer as it does, adds the mean losses of the {batches} "
                f"batches of a step: loss and gradients are {batches} times those of their mean. "
                "model.accepts_loss_kwargs = False makes both take the mean",
                stacklevel=2,
            )
