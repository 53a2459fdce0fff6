"""The gradients of a rank on their way to their mean, compressed; what was not sent is kept.

compress    what was kept is added, and as much as the method sends is taken away again
exchange    `exchange.py`
decompress  all replicas, from the same bytes: so their gradients have the same bits
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch

from ...compiler.compression.methods import Method
from ...compiler.ir.errors import StateError
from ..transport.transport import Endpoint, Loopback, Run
from .adacomp import AdaComp
from .exchange import Rounds, Share, carry
from .powersgd import PowerSGD
from .rounding import BFloat16, Int8, Rounded

DTYPE = torch.float32
"""Of the gradients that are compressed. Others travel as they are."""


class Compressor(Protocol):
    """A method at work on one rank's gradients.

    Attributes:
        residues: FQN -> what was not sent, in the parameter's form.
        bases: FQN -> what else outlives a step, the same on all replicas.
        held: the tensors that all of that lies in.
    """

    residues: dict[str, torch.Tensor]
    bases: dict[str, torch.Tensor]
    held: list[torch.Tensor]

    def mean_(self, scale: float) -> Rounds:
        """Replace the gradients by their mean, as far as it is sent.

        Args:
            scale: what they have been multiplied by.
        """
        ...


MAKERS: Mapping[str, Callable[..., Compressor]] = {
    "bf16": lambda method, *rest: Rounded(BFloat16(), *rest),
    "int8": lambda method, *rest: Rounded(Int8(), *rest),
    "powersgd": lambda method, *rest: PowerSGD(method.number, *rest),
    "adacomp": lambda method, *rest: AdaComp(method.number, *rest),
}


class Compressed:
    """Of one rank.

    Args:
        grads: FQN -> where its gradient adds up; those that are not of `DTYPE` are left out.

    Attributes:
        method: which one.
        sent_bytes: what this replica has given the others so far; in one process, what it would
            have.
        scale: what loss scaling has multiplied the gradients by.
        recoverable: what is kept can be put back as it was before a step, until `settle`.

    Raises:
        StateError: no gradient can be compressed.
    """

    def __init__(self, method: Method, grads: Mapping[str, torch.Tensor], endpoint: Endpoint):
        self._grads = {n: g for n, g in grads.items() if g.dtype is DTYPE and g.numel()}
        if grads and not self._grads:
            dtypes = ", ".join(sorted({str(g.dtype) for g in grads.values()}))
            raise StateError(
                f'compress={{"gradients": "{method}"}} has no effect on gradients in {dtypes}: it '
                "is for sums in fp32, so leave it out, or let them add up in fp32"
            )
        self.method, self._endpoint = method, endpoint
        self.scale, self.sent_bytes = 1.0, 0
        self.recoverable = isinstance(endpoint.transport, Loopback)
        self._before: list[torch.Tensor] | None = None
        make = partial(MAKERS[method.name], method, self._grads, endpoint.dp, endpoint.replica)
        self._compressor: Compressor | None = make() if self._grads else None
        self._begun = [each.clone() for each in self.bases.values()]

    @property
    def residues(self) -> dict[str, torch.Tensor]:
        return {} if self._compressor is None else self._compressor.residues

    @property
    def bases(self) -> dict[str, torch.Tensor]:
        return {} if self._compressor is None else self._compressor.bases

    def mean_(self) -> Run:
        """Replace the gradients by what all replicas take for their mean.

        Where one of them is not finite, on any replica, all become NaN, and nothing of it is kept.
        """
        if self._compressor is not None:
            yield from carry(self._rounds(self._compressor), self._endpoint, self._sent)

    def _sent(self, nbytes: int) -> None:
        self.sent_bytes += nbytes

    def _rounds(self, compressor: Compressor) -> Rounds:
        device = next(iter(self._grads.values())).device
        finite = all(bool(grad.isfinite().all()) for grad in self._grads.values())
        mine = torch.full((1,), finite, dtype=torch.uint8, device=device)
        told = yield Share(mine, [1] * self._endpoint.dp)
        if not all(bool(each.item()) for each in told):
            for grad in self._grads.values():
                grad.fill_(torch.nan)
            return
        if self.recoverable:
            self._before = [each.clone() for each in compressor.held]
        yield from compressor.mean_(self.scale)

    def settle(self, taken: bool) -> None:
        """A run is over.

        Args:
            taken: its gradients are used; else all is as before it, where that is recoverable.
        """
        if self._before is not None and not taken and self._compressor is not None:
            for held, before in zip(self._compressor.held, self._before, strict=True):
                held.copy_(before)
        self._before = None

    @torch.no_grad()
    def restart(self) -> None:
        """Nothing has been kept."""
        for residue in self.residues.values():
            residue.zero_()
        for basis, begun in zip(self.bases.values(), self._begun, strict=True):
            basis.copy_(begun)
