"""Clipping by the norm of all gradients, on all stages and replicas.

In which order torch takes the dtypes of a model only it knows; `_group_tensors_by_device_and_dtype`
has no public name, so this file is its home.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from ...compiler.ir.errors import GradientError
from ...compiler.tensors.norms import root
from ..state.accumulation import reported, reported_powers
from ..state.model_state import ModelState

Norms = Mapping[str, tuple[torch.dtype, torch.Tensor]]
"""Name -> the dtype of a gradient, and its norm."""


class GlobalNorm:
    """The norm of all gradients, each tied parameter once, in torch's arithmetic.

    The norm of the norms is taken over all parameters in the model's order, dtype by dtype as torch
    takes them, so that it has the same bits however the model is divided: on the device, by kernels
    for one tensor at a time (``foreach=False`` in torch). Where replicas divide rows it is that of
    all elements, summed in fp64.

    Args:
        kind: 2, another number above 0, or infinity.
        agree: exchanges a value between all processes.
    """

    def __init__(self, state: ModelState, kind: float, agree: Callable[[Any], list[Any]]):
        self._state, self._kind, self._agree = state, kind, agree

    def clip(self, max_norm: float, finite: bool) -> torch.Tensor:
        """Scale the gradients as `torch.nn.utils.clip_grad_norm_` does; the norm that they had.

        Args:
            finite: whether the norm has to be.

        Raises:
            GradientError: it is not; no gradient has been changed.
        """
        state = self._state
        by_rows = state.zero.divides_states and not state.zero.matrices
        total = (self._divided() if by_rows else self._whole()).to(state.device)
        if finite and not bool(torch.isfinite(total)):
            raise GradientError(
                f"the norm of all gradients, of order {self._kind:g}, is {float(total)}, so that "
                "they cannot be clipped: give error_if_nonfinite=False to scale them by it all the "
                "same, or drop them with pipe.zero_grad()"
            )
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for _, param in state.named_parameters():
            if param.grad is not None:
                param.grad.mul_(scale.to(param.grad.device))
        return total

    def _whole(self) -> torch.Tensor:
        state, kind = self._state, self._kind
        grads = reported(state)
        norms = {
            name: (grad.dtype, torch.linalg.vector_norm(grad, kind)) for name, grad in grads.items()
        }
        everywhere = self._exchanged(norms) if state.mesh.distributed else norms
        found = [everywhere[name] for name in state.skeleton.params if name in everywhere]
        if not found:
            return torch.zeros(())
        likes: Any = [torch.empty(0, dtype=dtype, device=state.device) for dtype, _ in found]
        groups = _group_tensors_by_device_and_dtype([likes], with_indices=True).values()
        parts = [found[i][1] for _, places in groups for i in places]
        if len({part.device for part in parts}) > 1:
            parts = [part.to(state.device) for part in parts]
        total: torch.Tensor = torch.linalg.vector_norm(torch.stack(parts).to(state.device), kind)
        return total

    def _exchanged(self, norms: Norms) -> Norms:
        """Those of all processes, on the CPU; a device is waited for once per dtype.

        They travel as Python's floats, which are exact for every dtype: it takes 0.2 ms to pickle
        and read a tensor, however small.
        """
        mine = []
        for dtype in dict.fromkeys(dtype for dtype, _ in norms.values()):
            names = [name for name, (its, _) in norms.items() if its is dtype]
            stacked = torch.stack([norms[name][1] for name in names])
            mine.append((dtype, stacked.dtype, names, stacked.tolist()))
        found: dict[str, tuple[torch.dtype, torch.Tensor]] = {}
        for part in self._agree(mine):
            for dtype, real, names, values in part:
                each = torch.tensor(values, dtype=real).unbind()
                found |= {name: (dtype, norm) for name, norm in zip(names, each, strict=True)}
        return found

    def _divided(self) -> torch.Tensor:
        """From each replica's own rows: powers in fp64, and a sum that has no order."""
        everywhere: dict[tuple[str, int], float] = {}
        for part in self._agree(reported_powers(self._state, self._kind)):
            everywhere |= {(n, r): value for n, found in part.items() for r, value in found.items()}
        dtypes = [param.dtype for param in self._state.skeleton.module.parameters()]
        wide = torch.float64 if torch.float64 in dtypes else torch.float32
        return torch.tensor(root(list(everywhere.values()), self._kind), dtype=wide)
