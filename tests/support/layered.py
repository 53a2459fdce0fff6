"""Models of layers, and whether some were copied while they were traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from pipecompile.compiler.capture.batch import flatten
from pipecompile.compiler.capture.capture import capture_training, function_of
from pipecompile.compiler.capture.exporting import exported, tracing
from pipecompile.compiler.capture.skeleton import Skeleton, skeleton_of
from pipecompile.compiler.ir.graph import tensors
from pipecompile.compiler.tracing import copies, likeness
from torch import fx, nn

HOST = torch.device("cpu")
CLASSES = 32
MODE = {"scale": 1.0}  # what a forward may set and put back


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.zeros((2, 8), dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


class Layer(nn.Module):
    """Has an index, which it reads if ``reads`` says so."""

    def __init__(self, index: int, scale: float = 1.0, drop: float = 0.1, reads: bool = False):
        super().__init__()
        self.index, self.scale, self.reads = index, scale, reads
        self.inner = nn.Linear(8, 8)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor, more: float = 0.0) -> torch.Tensor:
        y: torch.Tensor = self.inner(x.to(torch.float32)) * self.scale * MODE["scale"] + more
        if self.reads and self.index % 2:
            y = torch.relu(y)
        return x + self.drop(y)


class Stack(nn.Module):
    """Args:
    call: (layer, its number, a tensor) -> what the layer makes of it.
    """

    def __init__(self, layers: list[nn.Module], call: Callable[..., Any] | None = None):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 8)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, CLASSES)
        self.call = call or (lambda layer, _, x: layer(x))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.through(self.embed(input_ids))).flatten(0, 1)
        return {"loss": nn.functional.cross_entropy(logits, labels.flatten())}

    def through(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            x = self.call(layer, i, x)
        return x


def told(graph: fx.Graph) -> list[object]:
    """All that is to be known of a graph."""
    places: dict[int, int] = {}
    lines: list[object] = []
    for node in graph.nodes:
        values = tensors(node.meta.get("val"))
        memory = [places.setdefault(x.untyped_storage()._cdata, len(places)) for x in values]
        looks = [(tuple(x.shape), x.stride(), x.storage_offset(), x.dtype) for x in values]
        stack = [(key, path) for key, (path, _) in node.meta.get("nn_module_stack", {}).items()]
        own = node.op, node.name, str(node.target), str(node.args), str(node.kwargs)
        lines.append((*own, looks, memory, stack, str(node.meta.get("stack_trace"))))
    return lines


def forward_of(skeleton: Skeleton, batch: Any) -> list[object]:
    _, spec = flatten(batch)
    function, leaves = function_of(skeleton, spec, None, HOST, "loss", None)
    with skeleton.computing(), tracing(), torch.enable_grad():
        return told(exported(function, leaves)[0].graph)


def copied(model: nn.Module, batch: Any = None) -> int:
    """How many layers were copied; the graph is that of all layers traced, and so is the joint one.

    It is compared with names, memory that values share, modules and lines of code.
    """
    batch = batch or tokens()
    skeleton = skeleton_of(model, HOST)
    _, spec = flatten(batch)
    with mock.patch.object(copies, "copied", wraps=copies.copied) as calls:
        graph = forward_of(skeleton, batch)
        count = calls.call_count
        joint = capture_training(skeleton, spec, None, HOST).graph
    with mock.patch.object(likeness, "FEWEST", 10**9):
        assert graph == forward_of(skeleton, batch)
        whole = capture_training(skeleton, spec, None, HOST).graph
    assert joint.text() == whole.text()
    assert joint.fingerprint() == whole.fingerprint()
    meta = [
        [(n.meta.get("phase"), n.meta.get("partner"), n.meta.get("module")) for n in each.ops()]
        for each in (joint, whole)
    ]
    firsts = [[row[1] for row in rows] for rows in meta]
    assert [first.index(x) for first in firsts[:1] for x in first] == [
        first.index(x) for first in firsts[1:] for x in first
    ]
    assert [(a, c) for a, _, c in meta[0]] == [(a, c) for a, _, c in meta[1]]
    return count
