"""What the first graph of a model settles for those that follow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pipecompile.compiler.ir.shards import homes_in


def test_a_parameter_that_nothing_reads_lives_where_its_module_does() -> None:
    read: list[Any] = [{"words"}, {"layers.0.q"}, {"layers.0.v", "layers.1.q"}, {"head.weight"}]
    stages = [SimpleNamespace(stage=i, params=params) for i, params in enumerate(read)]
    program: Any = SimpleNamespace(stages=stages)
    names = ["layers.0.rare", "extra.bias", "scale", *(name for each in read for name in each)]
    homes = homes_in(program, names)
    assert homes["layers.0.rare"] == (2,)  # as layers.0.v, the later of its module's two
    assert homes["extra.bias"] == homes["scale"] == (0,)
    assert homes["layers.0.q"] == (1,)
