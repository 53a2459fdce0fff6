"""The same training on a device: as a pipeline of this process, or plainly."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from support import jobs, models, plain

_CLIP = partial(nn.utils.clip_grad_norm_, foreach=False)  # the norm's own kernel, tensor by tensor


def on_host(run: plain.Trained) -> plain.Trained:
    """With everything on the CPU, to be compared."""
    return plain.Trained(
        [loss.cpu() for loss in run.losses],
        [{name: grad.cpu() for name, grad in grads.items()} for grads in run.grads],
        [norm.cpu() for norm in run.norms],
        {name: value.cpu() for name, value in run.params.items()},
    )


def train(
    device: str, name: str, n_stages: int, dp: int, microbatches: int, **options: Any
) -> plain.Trained:
    """Three steps of a pipeline with clipping; batches come from the CPU."""
    steps = options.pop("steps", 3)
    given = (name, n_stages, dp, microbatches, "adamw", steps)
    options.setdefault("backend", "eager")
    return on_host(jobs.train(*given, device=device, **options))


def train_plainly(
    device: str, name: str, dp: int, microbatches: int, steps: int = 3, **options: Any
) -> plain.Trained:
    """The oracle for `train`."""
    model = models.build(name).to(device)
    batches = [
        {key: value.to(device) for key, value in batch.items()}
        for batch in models.batches(name, 2 * dp * microbatches, steps)
    ]
    adamw = jobs.OPTIMIZERS["adamw"]
    return on_host(plain.train(model, batches, adamw, dp, microbatches, clip=_CLIP, **options))


def worst(found: plain.Trained, expected: plain.Trained) -> float:
    """The largest difference of a loss or a gradient of the first step, relative to the largest
    element of the tensor."""
    pairs = [(found.losses[0], expected.losses[0])]
    pairs += [(found.grads[0][name], grad) for name, grad in expected.grads[0].items()]
    far = [
        float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))
        for a, b in pairs
    ]
    return max(far)
