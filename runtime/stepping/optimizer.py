"""The user's optimizer over this process's parameters, and clipping by the norm.

In which order torch takes the dtypes of a model only it knows; `_group_tensors_by_device_and_dtype`
has no public name, so this file is its home.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from ...compiler.profiling.standins import called
from ..state.accumulation import reported, reported_squares
from ..state.model_state import ModelState


def make_optimizer(
    factory: Callable[[Iterable[Any]], torch.optim.Optimizer], state: ModelState
) -> torch.optim.Optimizer:
    """Call the factory with the named parameters that this process trains.

    A process without any (a stage whose parameters are all frozen) gets an optimizer over one
    empty parameter, so that schedulers and loops work there too.

    Raises:
        OptionError: the factory returned something else.
    """
    named = [(name, param) for name, param in state.named_parameters() if param.requires_grad]
    if not named:
        named = [("nothing_to_train_here", nn.Parameter(torch.empty(0)))]
    return called(factory, named)


def clip_gradients(
    state: ModelState,
    max_norm: float,
    order: Sequence[str],
    agree: Callable[[Any], list[Any]],
) -> torch.Tensor:
    """Clip by the 2-norm over all stages, in `torch.nn.utils.clip_grad_norm_`'s arithmetic.

    The norm of the norms is taken over all parameters in the model's order, dtype by dtype as torch
    takes them, so that it has the same bits however the model is divided. Where replicas divide
    rows it is that of all elements, summed in fp64.

    Args:
        order: all parameter FQNs, in the model's order.
        agree: exchanges a value between all processes.
    """
    device = next(iter(state.ranks.values())).device
    total = (
        _divided_norm(state, agree)
        if state.zero.divides_states and not state.zero.matrices
        else _whole_norm(state, order, agree)
    ).to(device)
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for _, param in state.named_parameters():
        if param.grad is not None:
            param.grad.mul_(scale.to(param.grad.device))
    return total


def _whole_norm(
    state: ModelState, order: Sequence[str], agree: Callable[[Any], list[Any]]
) -> torch.Tensor:
    mine = {
        name: (grad.dtype, torch.linalg.vector_norm(grad, 2.0).cpu())
        for name, grad in reported(state).items()
    }
    everywhere: dict[str, tuple[torch.dtype, torch.Tensor]] = {}
    for part in agree(mine):
        everywhere |= part
    found = [everywhere[name] for name in order if name in everywhere]
    if not found:
        return torch.zeros(())
    likes: Any = [torch.empty(0, dtype=dtype, device=state.device) for dtype, _ in found]
    groups = _group_tensors_by_device_and_dtype([likes], with_indices=True).values()
    norms = [found[i][1] for _, places in groups for i in places]
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms), 2.0)
    return total


def _divided_norm(state: ModelState, agree: Callable[[Any], list[Any]]) -> torch.Tensor:
    """From each replica's own rows: squares in fp64, and a sum that has no order."""
    everywhere: dict[tuple[str, int], float] = {}
    for part in agree(reported_squares(state)):
        everywhere |= {(n, r): value for n, found in part.items() for r, value in found.items()}
    total = math.sqrt(math.fsum(everywhere.values()))
    dtypes = [param.dtype for param in state.skeleton.module.parameters()]
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    return torch.tensor(total, dtype=wide)
