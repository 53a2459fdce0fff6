"""Does an optimizer treat every element alone? Where replicas divide parameters it must.

Adam and SGD do. Muon, Adafactor, Shampoo, LAMB or L-BFGS need whole matrices or norms: over rows
they would silently compute something else. Rather than by a list of names this is found out by
trying, so that it holds for optimizers that nobody here has heard of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..compiler.capture.skeleton import Skeleton
from ..compiler.ir.errors import OptionError

_ROWS, _COLUMNS = 6, 4  # of the parameters that it is tried on; half of the rows are stepped alone
_STEPS = 3
_RATE = 0.1  # so that differences show, whatever the rate is
_TOLERANCE = 1e-4  # kernels may round differently at the ends of a vector

Factory = Callable[[Iterable[Any]], torch.optim.Optimizer]


def check_elementwise(
    factory: Factory, skeleton: Skeleton, names: Sequence[str], zero: int
) -> None:
    """Step small parameters whole, and half of their rows alone: these must come out alike.

    Args:
        names: of the parameters that this process trains.

    Raises:
        OptionError: they do not, or the optimizer cannot step without a closure.
    """
    like = {name: skeleton.module.get_parameter(name) for name in names}
    like = {name: param for name, param in like.items() if param.dim()}
    if not like:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = {name: _small(param) for name, param in like.items()}
        grads = [{name: torch.randn_like(t) for name, t in start.items()} for _ in range(_STEPS)]
        try:
            kind, whole = _stepped(factory, start, grads, _ROWS)
            _, half = _stepped(factory, start, grads, _ROWS // 2)
        except OptionError:
            raise
        except Exception as error:
            if _makes(factory, start):
                raise OptionError(
                    f"zero={zero} steps each replica's rows alone, and the optimizer failed on "
                    f"such rows ({type(error).__name__}: {error}): use zero=0"
                ) from error
            return  # the factory refuses small parameters; its own error comes with the real ones
    for name, rows in half.items():
        if not torch.allclose(rows, whole[name][: len(rows)], rtol=_TOLERANCE, atol=_TOLERANCE):
            raise OptionError(
                f"zero={zero} steps each replica's rows alone, and {kind} gives the rows of "
                f"{name!r} other values then: it needs whole parameters, so use zero=0 with it, or "
                "an optimizer that treats every element alone, such as AdamW"
            )


def _small(param: torch.Tensor) -> torch.Tensor:
    return torch.randn((_ROWS, *(_COLUMNS for _ in param.shape[1:])))


def _stepped(
    factory: Factory,
    start: dict[str, torch.Tensor],
    grads: Sequence[dict[str, torch.Tensor]],
    rows: int,
) -> tuple[str, dict[str, torch.Tensor]]:
    """The optimizer's name, and the first rows of all parameters after some steps."""
    params = {name: nn.Parameter(t[:rows].clone()) for name, t in start.items()}
    optimizer = factory(list(params.items()))
    for group in optimizer.param_groups:
        if isinstance(group.get("lr"), float):
            group["lr"] = _RATE
    for step in grads:
        for name, param in params.items():
            param.grad = step[name][:rows].clone()
        optimizer.step()
    return type(optimizer).__name__, {name: p.detach() for name, p in params.items()}


def _makes(factory: Factory, start: dict[str, torch.Tensor]) -> bool:
    try:
        factory([(name, nn.Parameter(t.clone())) for name, t in start.items()])
    except Exception:
        return False
    return True
