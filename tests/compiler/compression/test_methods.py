"""What compress= may be, and what methods need on paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipecompile import errors
from pipecompile.compiler.compression.methods import Compression, Method, parse_compression
from pipecompile.compiler.compression.sizes import needs, owned_chunks

SHAPES = st.lists(st.lists(st.integers(0, 60), max_size=3).map(tuple), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("given_", "meant"),
    [
        ("off", Compression()),
        ("int8", Compression(Method("int8"))),
        ("powersgd", Compression(Method("powersgd", 4))),
        ("powersgd:2", Compression(Method("powersgd", 2))),
        ({"values": "bf16"}, Compression(None, Method("bf16"))),
        ("gradients=adacomp:64,values=int8", Compression(Method("adacomp", 64), Method("int8"))),
        ({"gradients": "off", "values": None}, Compression()),
    ],
)
def test_what_is_meant(given_: Any, meant: Compression) -> None:
    assert parse_compression(given_) == meant
    assert parse_compression(str(meant)) == meant


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("int4", r'for gradients use "bf16", "int8", "powersgd", "adacomp", or "off"'),
        (8, "give a method for gradients"),
        ({"weights": "int8"}, "what is compressed is gradients or values"),
        ({"values": "powersgd:4"}, 'which is for gradients alone: for values use "bf16", "int8"'),
        ("int8:4", 'takes no number: write "int8"'),
        ("powersgd:0", "its rank, from 1 to 1024"),
        ("adacomp:few", "its numbers per bin, from 8 to 16384"),
    ],
)
def test_what_is_refused(wrong: Any, said: str) -> None:
    with pytest.raises(errors.OptionError, match=said):
        parse_compression(wrong)


@given(st.integers(0, 5000), st.integers(2, 7))
def test_every_chunk_has_one_owner(numel: int, dp: int) -> None:
    owned = [owned_chunks(numel, dp, r) for r in range(dp)]
    assert sum(owned) == math.ceil(numel / 256)
    assert max(owned) - min(owned) <= 1


@given(SHAPES, st.integers(2, 5))
def test_replica_0_sends_most(shapes: list[tuple[int, ...]], dp: int) -> None:
    """Which is what plans tell."""
    for name in ("bf16", "int8"):
        sent = [needs(Method(name), shapes, dp, r).sent_bytes for r in range(dp)]
        assert max(sent) == sent[0]
