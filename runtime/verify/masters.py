"""What an optimizer steps of a plain model: its parameters, or wider ones beside them."""

from __future__ import annotations

import torch
from torch import nn

from ...compiler.capture.narrowing import Narrowing
from ...compiler.ir.precision import REDUCED, Precision


class Masters:
    """Of a model's copy, which from here on computes as its precision says
    (`compiler.capture.narrowing`).

    Attributes:
        params: name -> what is stepped; the model's own where it computes with these.
    """

    def __init__(self, whole: nn.Module, precision: Precision | None):
        self._whole = whole
        self.params = dict(whole.named_parameters())
        self._apart = precision is not None and precision.narrows is not None
        if precision is None or not self._apart:
            return
        self.params = {name: _master(param) for name, param in self.params.items()}
        Narrowing.into(whole, precision)

    @torch.no_grad()
    def take(self) -> None:
        """Add up what a backward has left in the model's ``.grad``."""
        for name, param in self._whole.named_parameters() if self._apart else ():
            if param.grad is not None:
                master = self.params[name]
                grad, param.grad = param.grad.to(master.dtype), None
                master.grad = grad if master.grad is None else master.grad.add_(grad)

    @torch.no_grad()
    def spread(self) -> None:
        """Let the model compute with what the optimizer has made."""
        for name, param in self._whole.named_parameters() if self._apart else ():
            if param.requires_grad:
                param.copy_(self.params[name])


def _master(param: nn.Parameter) -> nn.Parameter:
    trained = param.requires_grad
    wide = torch.float32 if trained and param.dtype in REDUCED else param.dtype
    return nn.Parameter(param.detach().to(wide, copy=True), requires_grad=trained)
