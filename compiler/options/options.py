"""The options of `pipecompile.compile`, checked before anything is started."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ...passes.schedule.registry import DEFAULT, SCHEDULES
from ..capture.calling import LossFn
from ..costs.hardware import Device
from ..ir.errors import OptionError
from ..ir.precision import Precision, parse_precision
from ..plan.plan import Plan
from .weight_path import locate_weights

TIED_GRADS = ("per_microbatch", "per_step")
REMAT = ("auto", "none", "full")
COSTS = ("auto", "roofline", "profile")
ZERO = (0, 1, 2, 3)
SOLVERS = ("auto", "highs", "cbc", "dynamic")
_CHOICES = {
    "tied_grads": TIED_GRADS,
    "schedule": SCHEDULES,
    "remat": REMAT,
    "costs": COSTS,
    "solver": SOLVERS,
}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{prefix}i": 1 << 10 * (i + 1) for i, prefix in enumerate("kmgt")}


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
    weights: str | Path | None = None
    schedule: str = DEFAULT
    tied_grads: str = "per_microbatch"
    memory: int | str | None = None
    remat: str = "auto"
    precision: str | Precision | None = None
    zero: int | str = 0
    pin: Mapping[str, int] | None = None
    costs: str = "auto"
    hardware: str | Path | Device | None = None
    plan: str | Path | Plan | None = None
    solver: str = "auto"
    time_limit_s: float = 30.0
    dump_dir: str | Path | None = None
    skip: Collection[str] = ()

    def __post_init__(self) -> None:
        for name in ("n_stages", "dp", "microbatches"):
            _check_count(name, getattr(self, name), optional=name == "microbatches")
        for name in ("optimizer", "loss_fn", "lr_scheduler"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise OptionError(f"{name}={value!r} is not callable: {_WANTED[name]}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise OptionError(f"max_grad_norm={self.max_grad_norm} must be above 0")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                choices = " or ".join(map(repr, known))
                raise OptionError(f"{name}={getattr(self, name)!r}: use {choices}")
        if self.weights is not None:
            locate_weights(self.weights)
        if self.zero != "auto" and (isinstance(self.zero, bool) or self.zero not in ZERO):
            raise OptionError(f'zero={self.zero!r}: use 0, 1, 2, 3 or "auto"')
        self._check_planning()
        parse_precision(self.precision)
        if self.optimizer is None:
            for name in ("lr_scheduler", "max_grad_norm"):
                if getattr(self, name) is not None:
                    raise OptionError(
                        f"{name} has no effect without optimizer=: give one, or call "
                        "clip_grad_norm_ and your scheduler in your own loop"
                    )

    def _check_planning(self) -> None:
        if self.memory is not None:
            parse_bytes(self.memory, "memory")
        if not self.time_limit_s > 0:
            raise OptionError(f"time_limit_s={self.time_limit_s} must be above 0")
        for name, stage in (self.pin or {}).items():
            if not isinstance(stage, int) or not 0 <= stage < self.n_stages:
                raise OptionError(
                    f"pin={{{name!r}: {stage!r}}}: stages are 0 to {self.n_stages - 1}"
                )
        if self.costs == "profile" and self.hardware is not None:
            raise OptionError(
                'costs="profile" measures the device at hand: hardware= has no effect beside it'
            )
        if self.plan is not None:
            defaults = {field.name: field.default for field in fields(self)}
            for name in ("memory", "remat", "pin", "solver", "time_limit_s"):
                if getattr(self, name) != defaults[name]:
                    raise OptionError(
                        f"{name}= has no effect beside plan=: the plan has decided already"
                    )

    def check_zero(self) -> None:
        """Raises OptionError where replicas are to divide something and there is only one."""
        if self.zero not in (0, "auto") and self.dp == 1:
            raise OptionError(
                f"zero={self.zero} has no effect with dp=1, as there are no replicas to divide "
                "anything among: give dp=2 or more, or leave it out"
            )

    @property
    def zero_levels(self) -> tuple[int, ...]:
        """Those to try, in this order."""
        if self.dp == 1 or self.zero == 0:
            return (0,)
        return ZERO if self.zero == "auto" else (int(self.zero),)

    @property
    def dtypes(self) -> Precision | None:
        """The precision, whole; None where dtypes stay as they are."""
        return parse_precision(self.precision)

    @property
    def mixed(self) -> Precision | None:
        """The precision, if it computes in a dtype narrower than fp32."""
        dtypes = self.dtypes
        return dtypes if dtypes is not None and dtypes.casts else None

    @property
    def boundary(self) -> torch.dtype | None:
        """In which fp32 values travel between stages; None for as they are."""
        return None if self.dtypes is None else self.dtypes.boundary

    @property
    def measures(self) -> bool:
        """Whether prices are measured on the device at hand, and not taken from its peak rates.

        "auto" measures, unless the environment's PIPECOMPILE_COSTS says "roofline", or another
        device than the one at hand is planned for.
        """
        if self.costs != "auto":
            return self.costs == "profile"
        return self.hardware is None and os.environ.get("PIPECOMPILE_COSTS") != "roofline"

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else parse_bytes(self.memory, "memory")


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


def parse_bytes(given: int | str, name: str) -> int:
    """Bytes from an int or from a text such as ``"20GiB"``, ``"512 MB"``.

    Raises:
        OptionError: neither, or not above 0.
    """
    match = re.fullmatch(r"([\d_.]+)\s*([kmgt]?i?)b?", str(given).strip().lower())
    if isinstance(given, bool) or match is None or match[2] not in _UNITS:
        raise OptionError(f'{name}={given!r}: give bytes, or a text such as "20GiB"')
    try:
        number = float(match[1]) * _UNITS[match[2]]
    except ValueError:
        raise OptionError(f'{name}={given!r}: give bytes, or a text such as "20GiB"') from None
    if number < 1:
        raise OptionError(f"{name}={given!r} must be above 0")
    return int(number)


def _check_count(name: str, value: object, optional: bool) -> None:
    if value is None and optional:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise OptionError(f"{name}={value!r} must be an int")
    if value < 1:
        raise OptionError(f"{name}={value} must be at least 1")
