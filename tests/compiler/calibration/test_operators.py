"""Operators -> the shapes that tell what they reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipecompile.compiler.calibration.forms import Attention, Product
from pipecompile.compiler.calibration.operators import form_of
from pipecompile.compiler.costs.formulas import flops_of

aten = torch.ops.aten


def of(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    ("op", "args", "expected"),
    [
        (aten.mm.default, (of(6, 5), of(5, 7)), Product(1, 6, 7, 5)),
        (aten.addmm.default, (of(7), of(6, 5), of(5, 7)), Product(1, 6, 7, 5)),
        (aten.bmm.default, (of(3, 6, 5), of(3, 5, 7)), Product(3, 6, 7, 5)),
        (aten.baddbmm.default, (of(3, 6, 7), of(3, 6, 5), of(3, 5, 7)), Product(3, 6, 7, 5)),
        (aten.linear.default, (of(2, 6, 5), of(7, 5)), Product(1, 12, 7, 5)),
    ],
)
def test_products(op: Any, args: tuple[Any, ...], expected: Product) -> None:
    found = form_of(op, args, {})
    assert found == expected
    assert flops_of(op, args, {}, op(*args)) == expected.flops


def test_attention_by_heads_and_by_tokens() -> None:
    query, key = of(2, 4, 10, 8), of(2, 4, 12, 8)
    fused = aten._scaled_dot_product_flash_attention
    assert form_of(fused.default, (query, key, key), {}) == Attention(8, 10, 12, 8, False)
    back = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
    assert form_of(back, (query, query, key, key), {}) == Attention(8, 10, 12, 8, True)
    flash = aten._flash_attention_forward.default
    rows = of(2, 10, 4, 8)
    given = (rows, rows, rows, None, None, 10, 10, 0.0, True, False)
    assert form_of(flash, given, {}) == Attention(8, 10, 10, 8, False)
    packed, ends = of(24, 4, 8), of(4)
    given = (packed, packed, packed, ends, ends, 8, 8, 0.0, True, False)
    assert form_of(flash, given, {}) == Attention(12, 8, 8, 8, False)


def test_what_has_no_shape_is_priced_as_a_cube() -> None:
    assert form_of(aten.add.Tensor, (of(3), of(3)), {}) is None
    cube = Product.like(2 * 64**3)
    assert cube == Product(1, 64, 64, 64)
    assert Product.like(7).flops > 0
