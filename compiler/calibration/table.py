"""What one device reaches of its peaks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .attention import Attentions
from .forms import Attention, Form, Product
from .network import Network
from .products import Products


@dataclass(frozen=True)
class Table:
    """Efficiencies of one device.

    Attributes:
        memory: of the peak bandwidth, what kernels that move much reach.
        kernel_s: of every kernel, until its first blocks run and after its last ones.
        host_s: that the host takes to launch an operator; a program takes no less than all of its
            launches do.
        shared: of the seconds in which kernels and collectives run at the same time, the part
            that this costs: a collective takes multiprocessors and bandwidth.
        uneven: of a step, what it waits for the slowest machine, for each doubling of machines.
        sources: field -> where its numbers are from, in words.
        told: which table this is, for people.
        fused: element-wise operators are compiled together.
    """

    told: str
    products: Products
    attention: Attentions
    memory: float
    kernel_s: float
    host_s: float
    network: Network
    shared: float
    uneven: float
    sources: Mapping[str, str] = field(hash=False, repr=False, compare=False)
    fused: bool = False

    def kernel_seconds(
        self,
        flops: int,
        moved_bytes: int,
        dtype: str,
        form: Form | None,
        peak: float,
        bytes_per_s: float,
    ) -> float:
        """Of one launch.

        Args:
            form: of its products; None where that is not known.
            peak: FLOP/s of the dtype.
            bytes_per_s: of the memory, at its peak.
        """
        moving_s = moved_bytes / (self.memory * bytes_per_s)
        if not flops:
            return moving_s + self.kernel_s
        if isinstance(form, Attention):
            products_s = flops / (peak * self.attention.efficiency(form))
        else:
            known = form if isinstance(form, Product) else Product.like(flops)
            products_s = self.products.seconds(known, dtype, peak) * flops / known.flops
        return max(products_s, moving_s) + self.kernel_s

    def best(self, dtype: str, form: Form | None) -> float:
        """Of a dtype's peak, the most that products of any size reach."""
        if isinstance(form, Attention):
            return max(self.attention.forward, self.attention.backward)
        return self.products.share_of(dtype)

    def together_s(self, kernels_s: float, collectives_s: float) -> float:
        """Of kernels, with collectives beside them."""
        least, most = sorted((kernels_s, collectives_s))
        return most + self.shared * least

    def waiting(self, ranks: int) -> float:
        """By what a step of so many ranks is multiplied."""
        return 1 + self.uneven * math.log2(self.network.machines(ranks))
