"""Planning problems in the likeness of public ones: their layers, sizes and seconds, worked out.

resnet          ResNet-50's layers with and without recomputation, as in msr-fiddle/piper
bert_operators  BERT's operators as an exporter writes them, as in msr-fiddle/dnn-partitioning,
                for inference or with their backward
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipecompile.compiler.ir.problem import Option, Problem, Value

GIB = 2**30
_BATCH, _REMAT = 128, 0.09  # of what a layer keeps, with recomputation
_LINK = 25 * GIB


@dataclass
class _Layers:
    options: list[tuple[Option, Option]] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)

    def add(self, ms: float, again: float, kept: float, weights: float, *sources: int) -> int:
        """A layer; ``again`` of its seconds it takes more where it is recomputed."""
        held = 2 * weights
        self.options.append(
            (
                Option(ms, kept, held),
                Option(ms * (1 + again), _REMAT * kept, held + (1 - _REMAT) * kept),
            )
        )
        self.edges += [(source, len(self.sizes)) for source in sources]
        self.sizes.append(kept)
        return len(self.sizes) - 1

    def conv(self, last: int, cin: int, cout: int, side: int, kernel: int, stride: int = 1) -> int:
        area = _BATCH * side**2
        weights = 4.0 * cin * cout * kernel**2
        flops = 2 * area / stride**2 * weights / 4
        read, written = 4.0 * area * cin, 4.0 * area / stride**2 * cout
        ms = 3 * flops / 30e9 + 3 * (read + written) / 2.9e8
        return self.add(ms, 0.33, read, weights, last)

    def pointwise(self, last: int, channels: int, side: int, *, weights: bool) -> int:
        size = 4.0 * _BATCH * side**2 * channels
        return self.add(2.75 * size / 2.05e8, 0.47, size, 8.0 * channels * weights, last)

    def branch(self, last: int, cin: int, width: int, side: int, stride: int) -> int:
        last = self.pointwise(last, cin, side, weights=True)
        last = self.conv(last, cin, width, side, 1)
        last = self.pointwise(last, width, side, weights=False)
        last = self.pointwise(last, width, side, weights=True)
        last = self.conv(last, width, width, side, 3, stride)
        last = self.pointwise(last, width, side // stride, weights=False)
        last = self.pointwise(last, width, side // stride, weights=True)
        return self.conv(last, width, 4 * width, side // stride, 1)


def resnet(n_stages: int, memory_gib: float) -> Problem:
    """About 180 layers, two ways to run each, stage s of k with k − s microbatches in flight."""
    layers = _Layers()
    last = layers.add(0.0, 0.0, 0.0, 0.0)
    last = layers.conv(last, 3, 64, 224, 7, 2)
    last = layers.pointwise(last, 64, 112, weights=False)
    channels, side = 64, 56
    for number, count in enumerate((3, 4, 6, 3)):
        width = 64 * 2**number
        for block in range(count):
            stride = 2 if block == 0 and number else 1
            last = layers.pointwise(last, channels, side, weights=False)
            size = 4.0 * _BATCH * side**2 * channels
            last = layers.add(0.0, 0.0, size, 0.0, last)  # read by two
            end = layers.branch(last, channels, width, side, stride)
            skip = last
            if block == 0:
                skip = layers.pointwise(last, channels, side, weights=True)
                skip = layers.conv(skip, channels, 4 * width, side, 1, stride)
            channels, side = 4 * width, side // stride
            size = 4.0 * _BATCH * side**2 * channels
            last = layers.add(2.0 * size / 2.05e8, 0.5, 2 * size, 0.0, end, skip)
    last = layers.pointwise(last, channels, side, weights=False)
    layers.conv(last, channels, 1000, 1, 1)
    values = tuple(
        Value(u, (v,), 2 * layers.sizes[v] / _LINK, 2 * layers.sizes[v] / _LINK)
        for u, v in layers.edges
    )
    return Problem(
        tuple(layers.options),
        tuple(layers.edges),
        n_stages,
        values,
        in_flight=tuple(n_stages - s for s in range(n_stages)),
        budget_bytes=(memory_gib * GIB,) * n_stages,
    )


_HIDDEN, _TOKENS = 768, 8 * 384
_CROSS_S = 4.0 * _HIDDEN * _TOKENS / 12e9  # of a hidden state over a link


class _Operators:
    def __init__(self) -> None:
        self.ms: list[float] = []
        self.bytes: list[float] = []
        self.sends: list[float] = []
        self.edges: list[tuple[int, int]] = []

    def add(self, ms: float, *sources: int, weights: float = 0.0, crosses: float = 1.0) -> int:
        self.edges += [(source, len(self.ms)) for source in sources]
        self.ms.append(ms)
        self.bytes.append(weights)
        self.sends.append(1e3 * _CROSS_S * crosses)
        return len(self.ms) - 1

    def constant(self, weights: float = 0.0) -> int:
        return self.add(0.0, weights=weights, crosses=weights / (4.0 * _HIDDEN * _TOKENS))

    def reshape(self, source: int, crosses: float = 1.0) -> int:
        """With the shapes that an exporter computes."""
        shape = self.add(0.0, source, crosses=0.0)
        items = [
            self.add(0.0, self.add(0.0, shape, self.constant(), crosses=0.0), crosses=0.0)
            for _ in range(2)
        ]
        whole = self.add(0.0, *items, self.constant(), crosses=0.0)
        return self.add(0.0, source, whole, crosses=crosses)

    def linear(self, source: int, fan_in: int, fan_out: int) -> int:
        wide = fan_out / _HIDDEN
        ms = 2e3 * _TOKENS * fan_in * fan_out / 8e12
        weight = self.constant(4.0 * fan_in * fan_out)
        product = self.add(ms, source, weight, crosses=wide)
        return self.add(0.03 * wide, product, self.constant(4.0 * fan_out), crosses=wide)

    def norm(self, source: int) -> int:
        mean = self.add(0.02, source, crosses=1 / _HIDDEN)
        centred = self.add(0.03, source, mean)
        square = self.add(0.03, centred, self.constant())
        variance = self.add(0.02, square, crosses=1 / _HIDDEN)
        deviation = self.add(0.0, self.add(0.0, variance, self.constant(), crosses=1 / _HIDDEN))
        scaled = self.add(0.03, centred, deviation)
        scaled = self.add(0.03, scaled, self.constant(4.0 * _HIDDEN))
        return self.add(0.03, scaled, self.constant(4.0 * _HIDDEN))

    def layer(self, source: int, mask: int) -> int:
        scores = 12 * 384 / _HIDDEN
        q, k, v = (
            self.add(0.02, self.reshape(self.linear(source, _HIDDEN, _HIDDEN))) for _ in range(3)
        )
        score = self.add(0.9, q, k, crosses=scores)
        score = self.add(0.15, score, self.constant(), crosses=scores)
        score = self.add(0.15, score, mask, crosses=scores)
        score = self.add(0.3, score, crosses=scores)
        mixed = self.reshape(self.add(0.02, self.add(0.9, score, v)))
        mixed = self.add(0.03, self.linear(mixed, _HIDDEN, _HIDDEN), source)
        mixed = self.norm(mixed)
        wide = self.linear(mixed, _HIDDEN, 4 * _HIDDEN)
        erf = self.add(0.12, self.add(0.12, wide, self.constant(), crosses=4.0), crosses=4.0)
        erf = self.add(0.12, erf, self.constant(), crosses=4.0)
        gelu = self.add(0.12, self.add(0.12, wide, erf, crosses=4.0), self.constant(), crosses=4.0)
        return self.norm(self.add(0.03, self.linear(gelu, 4 * _HIDDEN, _HIDDEN), mixed))


def bert_operators(layers: int, n_stages: int = 6, *, training: bool = False) -> Problem:
    """Some 80 operators a layer; the largest load of a device counts.

    Args:
        training: with a backward operator for each that takes time, on the same device.
    """
    graph = _Operators()
    ids = graph.constant()
    mask = graph.add(0.0, graph.add(0.0, graph.constant(), crosses=0.01), crosses=0.01)
    last = graph.add(0.1, ids, graph.constant(4.0 * 30522 * _HIDDEN))
    last = graph.norm(last)
    for _ in range(layers):
        last = graph.layer(last, mask)
    graph.linear(last, _HIDDEN, 2)
    n = len(graph.ms)
    readers: dict[int, list[int]] = {}
    for u, v in graph.edges:
        readers.setdefault(u, []).append(v)
    together = []
    ms, sizes, sends = list(graph.ms), list(graph.bytes), list(graph.sends)
    backward: dict[int, int] = {}
    for u in reversed(range(n)) if training else ():
        if graph.ms[u] or any(v in backward for v in readers.get(u, ())):
            backward[u] = len(ms)
            together.append((u, len(ms)))
            ms.append(2 * graph.ms[u])
            sizes.append(0.0)
            sends.append(graph.sends[u])
    for u, v in graph.edges if training else ():
        if u in backward and v in backward:
            readers.setdefault(backward[v], []).append(backward[u])
            readers.setdefault(u, []).append(backward[v])
    return Problem(
        tuple((Option(s, static_bytes=b),) for s, b in zip(ms, sizes, strict=True)),
        tuple(graph.edges),
        n_stages,
        tuple(Value(u, tuple(vs), sends[u], sends[u]) for u, vs in readers.items()),
        together=tuple(together),
        budget_bytes=(16.0 * GIB,) * n_stages,
    )
