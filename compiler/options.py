"""The options of `pipecompile.compile`, checked before anything is started."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from .calling import LossFn
from .errors import OptionError

TIED_GRADS = ("per_microbatch", "per_step")
SCHEDULES = ("1f1b", "zb_h1")


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """See `pipecompile.compile` for what each means."""

    n_stages: int
    dp: int = 1
    microbatches: int | None = None
    optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None = None
    loss_fn: LossFn | None = None
    max_grad_norm: float | None = None
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    example_batch: Any = None
    device: str | torch.device | None = None
    seed: int | None = None
    schedule: str = "1f1b"
    tied_grads: str = "per_microbatch"
    dump_dir: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("n_stages", "dp", "microbatches"):
            _check_count(name, getattr(self, name), optional=name == "microbatches")
        for name in ("optimizer", "loss_fn", "lr_scheduler"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise OptionError(f"{name}={value!r} is not callable: {_WANTED[name]}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise OptionError(f"max_grad_norm={self.max_grad_norm} must be above 0")
        for name, known in (("tied_grads", TIED_GRADS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                choices = " or ".join(map(repr, known))
                raise OptionError(f"{name}={getattr(self, name)!r}: use {choices}")
        if self.optimizer is None:
            for name in ("lr_scheduler", "max_grad_norm"):
                if getattr(self, name) is not None:
                    raise OptionError(
                        f"{name} has no effect without optimizer=: give one, or call "
                        "clip_grad_norm_ and your scheduler in your own loop"
                    )


_WANTED = {
    "optimizer": "give a factory such as functools.partial(torch.optim.AdamW, lr=3e-4)",
    "loss_fn": "give a function of (output, batch)",
    "lr_scheduler": "give a function that takes the optimizer and returns its scheduler",
}


def parse_options(given: dict[str, Any]) -> CompileOptions:
    """Options from keyword arguments.

    Raises:
        OptionError: an unknown name, or a value out of range.
    """
    known = [field.name for field in fields(CompileOptions)]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise OptionError(f"unknown option {name!r}: {hint}")
    return CompileOptions(**given)


def _check_count(name: str, value: object, optional: bool) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise OptionError(f"{name}={value!r} must be an int")
    if value < 1:
        raise OptionError(f"{name}={value} must be at least 1")


def choose_microbatches(rows: int, n_stages: int) -> int:
    """The divisor of a replica's batch nearest to 4 per stage: a bubble of about a fifth.

    One stage has no bubble to fill, so its batch is left whole.
    """
    if n_stages == 1:
        return 1
    aim = 4 * n_stages
    divisors = [d for d in range(1, rows + 1) if rows % d == 0]
    return min(divisors, key=lambda d: (max(d / aim, aim / d), -d))
