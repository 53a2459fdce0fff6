"""Random programs, for passes that must not change a bit of any."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

ACTIVATIONS = (
    torch.tanh,
    torch.sigmoid,
    functional.relu,
    functional.gelu,
    functional.silu,
    functional.elu,
    functional.hardsigmoid,
    functional.hardtanh,
    functional.leaky_relu,
    functional.softplus,
    torch.exp,
)


class Drawn(nn.Module):
    """A random program in which values are read again, viewed, turned and cut."""

    def __init__(self, steps: list[tuple[int, int, int]]):
        super().__init__()
        torch.manual_seed(0)
        self.steps = steps
        self.linear = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x * self.scale, self.linear(x)]
        for kind, i, j in self.steps:
            a, b = values[i % len(values)], values[j % len(values)]
            values.append(self.made(kind, i, a, b))
        return sum((value.square().mean() for value in values), torch.zeros(()))

    def made(self, kind: int, i: int, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if kind == 0:
            return self.linear(ACTIVATIONS[i % len(ACTIVATIONS)](a))
        if kind == 1:
            return a + b
        if kind == 2:
            return (a * b).tanh() * a
        if kind == 3:
            return (a.transpose(-1, -2) - 0.5) * b
        if kind == 4:
            left, right = (a * 2).chunk(2, -1)
            return torch.cat([left * right.sigmoid(), b[..., :4] + left], -1)
        if kind == 5:
            return torch.softmax(a, -1) + torch.log_softmax(b.clone(), i % 3)
        if kind == 6:
            return torch.where(a > b, a * 0.5, (b + 1).exp() * 0.1)
        return (a.reshape(-1, 4) + 1).view(a.shape).clone() * self.scale


STEPS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 12), st.integers(0, 9)), max_size=8)
