"""Parameters that replicas divide are whole layer by layer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pipecompile.compiler.ir import ops
from pipecompile.compiler.ir.program import Program
from support import jobs, models
from support.matrix import quickly

LAYERS = {"gpt2": {"n_layer": 6}, "llama": {"num_hidden_layers": 6}}


def under_way(program: Program) -> Iterator[int]:
    """How many groups of parameters are there, or fetched, after each operator."""
    nodes = list(program.module.graph.nodes)
    last: dict[object, int] = {}
    source: dict[object, object] = {}  # what lies in a group's memory -> what began to fetch it
    for i, node in enumerate(nodes):
        if node.target is ops.gather:
            source[node] = node
        for each in node.all_input_nodes:
            if each in source:
                last[source[each]] = i
                if node.target is ops.unshard or (node.op == "call_function" and _is_part(node)):
                    source[node] = source[each]
    begun = {node: i for i, node in enumerate(nodes) if node.target is ops.gather}
    for i, _ in enumerate(nodes):
        yield sum(start <= i < last[node] for node, start in begun.items())


def _is_part(node: object) -> bool:
    return getattr(node, "target", None).__name__ in ("getitem", "t.default")  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("name", quickly(["llama"], list(LAYERS)))
def test_a_backward_fetches_a_layer_while_the_one_after_computes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views of weights stand before all layers in the graph, and would have all of them fetched."""
    make, batch = models.MODELS[name]
    monkeypatch.setitem(models.MODELS, name, (lambda: make(**LAYERS[name]), batch))  # type: ignore[call-arg]
    pipe = jobs.pipeline(name, 1, 2, 1, zero=3)
    pipe.compile_for(models.batches(name, 4, 1)[0])
    (stage,) = pipe.programs.stages
    assert stage.backward is not None
    tied = name == "gpt2"  # the embedding stays for the whole forward
    assert max(under_way(stage.forward)) == 2 + tied
    assert max(under_way(stage.backward)) == 2
