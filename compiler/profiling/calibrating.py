"""Measures in seconds what the device at hand reaches: products, attention, memory, launches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import exp, log
from statistics import median

import torch
from torch import nn

from ..calibration.forms import Attention, Product
from ..calibration.products import Products
from ..calibration.tables import table_of
from ..costs.at_hand import device_name, device_spec
from ..tensors.facts import short_name
from .calibration import Measured

FILLS = (0.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
ROUNDS = 12  # of which the best counts: what else runs only makes others longer
WINDOW_S = 0.01  # of a round
TINY = 8  # elements of an operator that takes no time but its launch
LAUNCHES = 2000


@dataclass(frozen=True)
class Shapes:
    """What is measured on a kind of device."""

    dtypes: tuple[torch.dtype, ...]
    products: tuple[Product, ...]
    attention: tuple[Attention, ...]
    moved_bytes: int


_CPU = Shapes(
    (torch.float32, torch.bfloat16),
    tuple(
        Product(1, m, n, k)
        for m, n, k in ((512, 768, 768), (1024, 1024, 1024), (512, 3072, 768), (768, 768, 64))
    ),
    (Attention(4, 256, 256, 64, False), Attention(4, 1024, 1024, 64, False)),
    64 << 20,
)
_CUDA = Shapes(
    (torch.float32, torch.bfloat16, torch.float16),
    tuple(
        Product(1, m, n, k)
        for m, n, k in (
            (8192, 8192, 8192),
            (4096, 12288, 4096),
            (8192, 4096, 1024),
            (8192, 8192, 128),
            (2048, 2048, 16384),
        )
    ),
    (Attention(64, 512, 512, 128, False), Attention(16, 8192, 8192, 128, False)),
    1 << 30,
)


@dataclass(frozen=True)
class Sample:
    """One measurement: what was run, and what that takes."""

    what: str
    seconds: float
    flops: float = 0.0
    moved_bytes: float = 0.0


def calibrate(device: torch.device) -> tuple[Measured, list[Sample]]:
    """Run a handful of kernels; what they reach, and each of them.

    Args:
        device: nothing else may be running there.
    """
    shapes = _CPU if device.type == "cpu" else _CUDA
    spec = device_spec(device)
    host_s = _launch_s(device)
    table = table_of(spec.name)
    kernel_s = host_s if device.type == "cpu" else min(host_s, table.kernel_s)
    samples = [Sample("launch of an operator", host_s)]
    fills, products = [], {}
    for dtype in shapes.dtypes:
        times = [(form, _product_s(form, dtype, device)) for form in shapes.products]
        samples += [
            Sample(f"{short_name(dtype)} product {f.m} × {f.k} × {f.n}", s, f.flops)
            for f, s in times
        ]
        fill, rate = _fitted(table.products, [(f, max(s - kernel_s, s / 2)) for f, s in times])
        fills.append(fill)
        products[short_name(dtype)] = rate
    dtype = shapes.dtypes[0] if device.type == "cpu" else torch.bfloat16
    forward, backward, half = _attention(shapes.attention, dtype, device, samples)
    moved_s = _moved_s(shapes.moved_bytes, device)
    samples.append(Sample("element-wise sum", moved_s, moved_bytes=shapes.moved_bytes))
    return Measured(
        spec=spec.name,
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        products=products,
        fill=median(fills),
        attention_dtype=short_name(dtype),
        attention_forward=forward,
        attention_backward=backward,
        half_tokens=half,
        bytes_per_s=shapes.moved_bytes / max(moved_s - kernel_s, moved_s / 2),
        kernel_s=kernel_s,
        host_s=0.0 if device.type == "cpu" else host_s,  # a CPU launches when it computes
    ), samples


def _fitted(model: Products, times: list[tuple[Product, float]]) -> tuple[float, float]:
    """The fill with which shapes agree most, and the rate of a very large product."""
    best = float("inf"), 0.0, 0.0
    for fill in FILLS:
        tried = replace(model, fill=fill)
        logs = [log(tried.unit_flops(form) * tried.units / s) for form, s in times]
        middle = median(logs)
        best = min(best, (sum(abs(each - middle) for each in logs), fill, exp(middle)))
    return best[1:]


def _product_s(form: Product, dtype: torch.dtype, device: torch.device) -> float:
    left = torch.full((form.m, form.k), 0.01, dtype=dtype, device=device)
    right = torch.full((form.k, form.n), 0.01, dtype=dtype, device=device)
    made = torch.empty(form.m, form.n, dtype=dtype, device=device)
    return _seconds(lambda: torch.mm(left, right, out=made), device)


def _attention(
    shapes: tuple[Attention, ...],
    dtype: torch.dtype,
    device: torch.device,
    samples: list[Sample],
) -> tuple[float, float, float]:
    """FLOP/s of forward and backward at very many tokens, and the tokens at which it is half.

    The rate grows as tokens / (tokens + half), so that two lengths tell both numbers.
    """
    rates: list[tuple[float, float]] = []
    for form in shapes:
        found = []
        pairs = form.heads * form.queries * (form.queries + 1) // 2
        for name, act, products in zip(
            ("forward", "backward"), _causal(form, dtype, device), (4, 10), strict=True
        ):
            seconds = _seconds(act, device)
            flops = products * pairs * form.width
            samples.append(Sample(f"attention {name}, {form.keys} tokens", seconds, flops))
            found.append(flops / seconds)
        rates.append((found[0], found[1]))
    short, long = shapes
    most = 0.9 * long.keys / short.keys  # of a ratio that such a curve can have
    ratio = min(max(1.0, rates[1][0] / rates[0][0]), most)
    half = (ratio - 1) * short.keys * long.keys / (long.keys - ratio * short.keys)
    half = min(half, long.keys / 2)  # the longer one is long: no noise makes much more of it
    full = (long.keys + half) / long.keys
    return rates[1][0] * full, rates[1][1] * full, half


def _causal(
    form: Attention, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward and backward of one row."""
    size = 1, form.heads, form.queries, form.width
    query, key, value = given = [
        torch.full(size, 0.01, dtype=dtype, device=device, requires_grad=True) for _ in range(3)
    ]

    def attend() -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    made = attend()
    grad = torch.full_like(made, 0.01)
    return attend, partial(torch.autograd.grad, made, given, grad, retain_graph=True)


def _moved_s(nbytes: int, device: torch.device) -> float:
    source = torch.zeros(nbytes // 8, device=device)  # read and written: 4 bytes each
    made = torch.empty_like(source)
    return _seconds(lambda: torch.add(source, 1.0, out=made), device)


def _launch_s(device: torch.device) -> float:
    source, made = torch.zeros(TINY, device=device), torch.zeros(TINY, device=device)

    def many() -> None:
        for _ in range(LAUNCHES):
            torch.add(source, source, out=made)

    return _seconds(many, device) / LAUNCHES


def _seconds(act: Callable[[], object], device: torch.device) -> float:
    """Of one call, the best of some rounds."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return min(_rounds(act, device))


def _rounds(act: Callable[[], object], device: torch.device) -> Iterator[float]:
    act()
    once = _timed(act, device, 1)
    count = max(1, round(WINDOW_S / max(once, 1e-7)))
    for _ in range(ROUNDS):
        yield _timed(act, device, count)


def _timed(act: Callable[[], object], device: torch.device, count: int) -> float:
    """Of one of so many calls, which a GPU carries out back to back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        act()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / count
