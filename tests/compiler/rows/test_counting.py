"""What microbatches count is made on the host, wherever graphs were traced."""

from __future__ import annotations

import torch
from pipecompile.compiler.ir.program import Port, Role
from pipecompile.compiler.rows.loss import Counting
from torch import fx

ATEN = torch.ops.aten


def test_counts_are_made_on_the_host() -> None:
    """What the operators make stands on the device that they were traced for: here one that has no
    values."""
    graph = fx.Graph()
    labels, held = graph.placeholder("labels"), graph.placeholder("held")
    ignored = graph.call_function(
        ATEN.full.default, ([], -100), {"device": torch.device("meta"), "dtype": torch.int64}
    )
    kept = graph.call_function(ATEN.ne.Tensor, (labels, ignored))
    graph.output([graph.call_function(ATEN.sum.default, (kept,)), held])
    ports = (Port(Role.BATCH, 0), Port(Role.BUFFER, "held"))
    counting = Counting(fx.GraphModule({}, graph), ports)
    leaves = [torch.tensor([1, -100, 2])]
    assert counting(leaves, {"held": torch.tensor(3)}) == [2.0, 3.0]
