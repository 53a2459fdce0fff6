"""In which dtypes a model is computed, its gradients add up, and values cross stages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .errors import OptionError

NAMED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OF_PARAMS = {f"{name}_params": dtype for name, dtype in NAMED.items() if name != "fp32"}
"""Names of those that cast parameters, and not operators."""
REDUCED = (torch.bfloat16, torch.float16)
TABLES = ("cpu", "cuda")
MIN_SCALE, MAX_SCALE = 2.0**-64, 2.0**96  # of a loss: gradients fit into fp32 on either side


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """Dynamic loss scaling, which keeps small fp16 gradients from becoming zero.

    The loss is multiplied by a scale before it is differentiated, the gradients are divided by it
    afterwards. A step with a gradient that is not finite is skipped (Micikevicius et al., Mixed
    Precision Training, ICLR 2018). The defaults are those of `torch.amp.GradScaler`.

    Attributes:
        init: the first scale.
        growth: the scale is multiplied by it after ``interval`` good steps in a row.
        backoff: the scale is multiplied by it after a skipped step.
    """

    init: float = 2.0**16
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000

    def __post_init__(self) -> None:
        fine = MIN_SCALE <= self.init <= MAX_SCALE and 1 <= self.growth < math.inf
        if not fine or not 0 < self.backoff < 1 or self.interval < 1:
            raise OptionError(
                f"{self}: init must be between 2**-64 and 2**96, growth at least 1 and finite, "
                "backoff between 0 and 1, interval at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What ``compile(precision=...)`` takes beside "fp32", "bf16", "bf16_params" and so on.

    Attributes:
        compute: of matrix products, convolutions and attention; of everything, where that is
            ``params`` too.
        params: as operators read parameters: fp32, and casts are made where `torch.autocast` has
            them; or ``compute``, and the model computes as ``model.to(compute)`` does
            (`compiler.capture.narrowing`). Masters, which the optimizer steps, are fp32 in any
            case.
        grads: in which the gradients of the microbatches add up: fp32, or ``compute``.
        boundary: fp32 values travel between stages in bf16, or in fp16 where that is ``compute``
            and the loss is scaled; None sends them as they are. It rounds what crosses, so that
            losses depend on where the stages are divided.
        table: whose operator lists count: "cpu" or "cuda", as in `torch.autocast`; None takes
            those of the device that is planned for.
        lower, fp32: names of ATen operators ("softmax", "layer_norm") that are computed in
            ``compute`` or in fp32 whatever the lists say. With ``params``, where there are no
            lists, the results of those in fp32 are rounded to the dtype that they would have had.
        fp32_modules: dotted names of modules whose matrix products stay in fp32; ``*`` stands
            for anything, as in ``"model.layers.*.mlp.gate"``. With ``params`` all of such a module
            is in fp32, its parameters too: what it is given is widened, what it returns rounded.
        loss_scale: None for the usual one where ``compute`` is fp16, and for none elsewhere.
    """

    compute: torch.dtype
    params: torch.dtype = torch.float32
    grads: torch.dtype = torch.float32
    boundary: torch.dtype | None = None
    table: str | None = None
    lower: Collection[str] = ()
    fp32: Collection[str] = ()
    fp32_modules: Collection[str] = ()
    loss_scale: LossScale | None = None

    def __post_init__(self) -> None:
        if self.compute not in NAMED.values():
            raise OptionError(f"Precision(compute={self.compute}): {_one_of(NAMED.values())}")
        for option in ("params", "grads"):
            if (given := getattr(self, option)) not in (torch.float32, self.compute):
                accepted = dict.fromkeys((torch.float32, self.compute))
                raise OptionError(f"Precision({option}={given}): {_one_of(accepted)}")
        known = [d for d in REDUCED if d is torch.bfloat16 or d is self.compute]
        if self.boundary is not None and self.boundary not in known:
            raise OptionError(f"Precision(boundary={self.boundary}): {_one_of(known)}")
        if self.table is not None and self.table not in TABLES:
            raise OptionError(f"Precision(table={self.table!r}): {_one_of(map(repr, TABLES))}")
        self._check_lists()
        if self.compute is torch.float16 and self.loss_scale is None:
            object.__setattr__(self, "loss_scale", LossScale())
        if self.compute is not torch.float16 and self.loss_scale is not None:
            raise OptionError(
                f"Precision(loss_scale=) has no effect with {_short(self.compute)}, which has the "
                "range of fp32: leave it out"
            )

    def _check_lists(self) -> None:
        for option in ("lower", "fp32", "fp32_modules"):
            given = getattr(self, option)
            if isinstance(given, str):
                raise OptionError(f"Precision({option}={given!r}): give a list of names")
            if given and self.compute is torch.float32:
                raise OptionError(f"Precision({option}=) has no effect: compute is fp32")
            object.__setattr__(self, option, tuple(given))
        if self.table is not None and self.compute is torch.float32:
            raise OptionError("Precision(table=) has no effect: compute is fp32")
        if self.narrows is not None and (self.lower or self.table is not None):
            option = "lower" if self.lower else "table"
            raise OptionError(
                f"Precision({option}=) has no effect beside params={self.params}: no operator is "
                "looked up in a list, all compute in the dtype of what they are given"
            )
        for name in (*self.lower, *self.fp32):
            if not hasattr(torch.ops.aten, name):
                raise OptionError(f"Precision: there is no ATen operator {name!r}")
        if both := set(self.lower) & set(self.fp32):
            raise OptionError(f"Precision: {sorted(both)[0]!r} is in lower and in fp32")

    @property
    def casts(self) -> bool:
        """Whether anything is computed in another dtype than fp32."""
        return self.compute is not torch.float32

    @property
    def autocasts(self) -> torch.dtype | None:
        """What operators are cast to, as by `torch.autocast`; None where none is."""
        return self.compute if self.casts and self.narrows is None else None

    @property
    def narrows(self) -> torch.dtype | None:
        """What parameters are cast to; None where operators read them as they are held."""
        return None if self.params is torch.float32 else self.params

    def grads_of(self, dtype: torch.dtype) -> torch.dtype:
        """In which dtype the gradients of a parameter of some dtype add up."""
        return self.grads if dtype is torch.float32 else dtype

    def fp32_patterns(self, module: str) -> set[str]:
        """Those of ``fp32_modules`` that stand for a module, or for one that it is in."""
        parts = module.split(".")
        prefixes = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return {name for name in self.fp32_modules if any(fnmatchcase(p, name) for p in prefixes)}

    def __str__(self) -> str:
        parts = [_short(self.compute) + ("_params" if self.narrows else "")]
        if self.grads is not torch.float32:
            parts.append(f"grads={_short(self.grads)}")
        if self.boundary is not None:
            parts.append(f"boundary={_short(self.boundary)}")
        if self.table is not None:
            parts.append(f"table={self.table}")
        for option in ("lower", "fp32", "fp32_modules"):
            if names := getattr(self, option):
                parts.append(f"{option}={'|'.join(sorted(names))}")
        return " ".join(parts)


def parse_precision(given: object) -> Precision | None:
    """None (dtypes stay as they are), a name, or a `Precision`.

    Raises:
        OptionError: none of these.
    """
    if given is None or isinstance(given, Precision):
        return given
    if isinstance(given, str) and given in NAMED:
        return Precision(compute=NAMED[given])
    if isinstance(given, str) and given in OF_PARAMS:
        return Precision(compute=OF_PARAMS[given], params=OF_PARAMS[given])
    names = ", ".join(map(repr, (*NAMED, *OF_PARAMS)))
    raise OptionError(f"precision={given!r}: use {names}, or a pipecompile.Precision")


def computed_in(dtypes: Precision | None, module: nn.Module) -> str:
    """The name of the dtype of most matrix products.

    Args:
        dtypes: None for those of the module's parameters.
    """
    if dtypes is not None:
        return str(dtypes.compute).removeprefix("torch.")
    counts: Counter[torch.dtype] = Counter()
    for param in module.parameters():
        counts[param.dtype] += param.numel()
    most = counts.most_common(1)
    return str(most[0][0]).removeprefix("torch.") if most else "float32"


def autocast(compute: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """torch's own, to this dtype; None changes nothing."""
    if compute is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=compute)


def _short(dtype: torch.dtype) -> str:
    return next((name for name, known in NAMED.items() if known is dtype), str(dtype))


def _one_of(accepted: object) -> str:
    return f"use {' or '.join(map(str, accepted))}"  # type: ignore[call-overload]
