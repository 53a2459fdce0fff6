"""Values of a microbatch live until the last of their readers, on whichever rank that is."""

from __future__ import annotations

import torch
from pipecompile.compiler.ir.actions import Phase
from pipecompile.compiler.ir.program import (
    Message,
    PipelineProgram,
    Program,
    StageProgram,
    ValueSpec,
    on_demand,
)
from torch import fx, nn


def message(src: int, dst: int, *names: str) -> Message:
    values = (ValueSpec(name, (1,), (1,), torch.float32) for name in names)
    return Message(src, dst, Phase.FORWARD, tuple(values))


def test_what_is_handed_over_is_kept_until_it_is_sent() -> None:
    """Stages 0, 2 and 3 share a rank: these two have their values before 1 and 4 are sent any."""
    nothing = Program(on_demand(nn.Module(), fx.Graph()), (), ())
    drops = {("B", -1): ("h",), ("SEND_F", 2): ("x", "y"), ("SEND_F", 4): ("z",)}
    first = StageProgram(0, nothing, nothing, None, None, (), (), (), drops=drops)
    messages = (message(0, 1, "x"), message(0, 2, "x", "y"), message(0, 3, "z"), message(0, 4, "z"))
    program = PipelineProgram((first,), messages, (), 4, None)
    assert program.drops(0, [0]) == drops
    assert program.drops(0, [0, 2, 3]) == {
        ("B", -1): ("h",),
        ("SEND_F", 1): ("x",),
        ("SEND_F", 2): ("y",),
        ("SEND_F", 4): ("z",),
    }
