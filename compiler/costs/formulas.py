"""FLOPs of operators: matrix products, and what is made of them.

A multiply-add counts as two, and only products count: what is done to each element besides, softmax
and bias included, moves bytes, and these are counted elsewhere. FLOPs are those that kernels do:

* Attention that is *told* to be causal, or to see a window, skips what is masked, forward and
  backward: fused kernels leave out the blocks above the diagonal, which are about half of a square.
  torch's own registry (`torch.utils.flop_counter`) counts the whole square.
* A mask that is a tensor is added to scores that are all computed: sliding windows and padding
  count in full, and so does attention that is written out as two products and a softmax.
* The backward of fused attention computes the scores again: five products for the forward's two.
* Experts (a grouped product) multiply each row with the matrix of its own group.
* A backward counts the gradients that it is asked for.

Formulas are by the schema's name of an operator and take operands by their names in the schema, so
that defaults and keywords need no care. What stands here goes before torch's registry, which counts
weight gradients of grouped convolutions too often, once for each group, and reads (batch, tokens,
heads, width) as (batch, heads, tokens, width). The rest is asked there, so that
`torch.utils.flop_counter.register_flop_formula` teaches it operators of one's own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from . import attention_flops

Formula = Callable[..., int]
"""Operands by name, and ``made``, what the operator returns -> FLOPs."""

T = torch.Tensor


def flops_of(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], made: Any) -> int | None:
    """FLOPs of one call, None of an operator that has no formula.

    Args:
        args, kwargs: tensors, fake ones too, and whatever else the operator is given.
        made: what it returns.
    """
    schema = getattr(op, "_schema", None)
    formula = None if schema is None else _FORMULAS.get(schema.name.rstrip("_"))
    if formula is not None:
        return int(formula(**_bound(schema, args, kwargs), made=made))
    known = flop_registry.get(getattr(op, "overloadpacket", op))
    return None if known is None else int(known(*args, **kwargs, out_val=made))


def _bound(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Operands by the names of the schema; defaults where none was given."""
    named = {a.name: a.default_value for a in schema.arguments}
    named |= dict(zip((a.name for a in schema.arguments), args, strict=False))
    return named | dict(kwargs)


_PRODUCTS = re.compile(
    r"mm(?!a|ing)|matmul|attention|multi_head|conv(?!ert)|dot|linear(?!1d|2d|3d|_)|mv(?!l)|rnn|lstm"
    r"|gru|linalg|solve|inverse|qr\b|qrf\b|svd|eig|cholesky|lu_factor|cov\b|corrcoef|cdist"
)
_NEVER = {torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.view_copy}


def lacking(op: Any) -> str:
    """The name of an operator without a formula that may hold matrix products; "" of others.

    ATen's tell by their names: an ordinary one moves bytes. One of another library may do anything.
    """
    schema = getattr(op, "_schema", None)
    if schema is None or schema.name.rstrip("_") in _FORMULAS:
        return ""
    library, _, name = schema.name.partition("::")
    if library in ("prims", "pipecompile") or op.overloadpacket in flop_registry:
        return ""
    if library == "aten" and (_NEVER & set(op.tags) or not _PRODUCTS.search(name)):
        return ""
    return f"{library}.{name}"


# -- matrix products ------------------------------------------------------------------------------


def _product(left: T, right: T) -> int:
    """(..., m, k) × (..., k, n), of as many matrices; a vector is one column."""
    return 2 * left.numel() * (right.shape[-1] if right.dim() > 1 else 1)


def _pair(left: str, right: str) -> Formula:
    """The product of two operands, whatever it is added to."""
    return lambda **given: _product(given[left], given[right])


def _outer(vec1: T, vec2: T, **_: Any) -> int:
    return 2 * vec1.numel() * vec2.numel()


def _matmul(self: T, made: T, **_: Any) -> int:
    return 2 * made.numel() * self.shape[-1]


def _matmul_backward(grad: T, self: T, mask: Sequence[bool], **_: Any) -> int:
    return 2 * grad.numel() * self.shape[-1] * sum(mask)


def _grouped(left: T, right: T) -> int:
    """Rows, columns or the inner dimension of matrices are divided among groups.

    (rows, k) × (groups, k, n)      the rows of a group by its matrix: experts
    (groups, m, k) × (k, columns)   a group's matrix by its columns
    (m, rows) × (rows, n)           a matrix per group, a sum over its rows: weights of experts
    (groups, m, k) × (groups, k, n) as many products
    """
    if left.dim() == 3 and right.dim() == 2:
        return 2 * left.shape[1] * right.numel()
    return _product(left, right)


def _grouped_mm(self: T, mat2: T, **_: Any) -> int:
    return _grouped(self, mat2)


def _experts(input: T, weight: T, **_: Any) -> int:
    return _grouped(input, weight)


def _experts_backward(input: T, weight: T, **_: Any) -> int:
    return 2 * _grouped(input, weight)


def _many(self: Sequence[T], mat2: Sequence[T], **_: Any) -> int:
    return sum(map(_product, self, mat2))


def _packed(self: T, made: T, **_: Any) -> int:
    """With weights in a layout of their own: only the result tells their columns."""
    return 2 * self.numel() * made.shape[-1]


def _linear(weight: T, input: T | None = None, self: T | None = None, **_: Any) -> int:
    x = input if self is None else self
    assert x is not None
    return 2 * x.numel() * weight.shape[0]


def _linear_backward(self: T, weight: T, output_mask: Sequence[bool], **_: Any) -> int:
    return _linear(weight, self) * sum(output_mask[:2])


def _trilinear(
    i1: T,
    i2: T,
    i3: T,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    **_: Any,
) -> int:
    """`nn.Bilinear`, and its gradients: the dimensions that some operands lack are broadcast."""
    shapes: list[list[int]] = []
    for operand, dims in ((i1, expand1), (i2, expand2), (i3, expand3)):
        shape = list(operand.shape)
        for dim in sorted(dims):
            shape.insert(dim, 1)
        shapes.append(shape)
    whole: list[int] = [max(sizes) for sizes in zip(*shapes, strict=True)]
    return 2 * math.prod(whole)


def _distances(x1: T, x2: T, **_: Any) -> int:
    """Between all of (..., p, m) and all of (..., r, m)."""
    return _product(x1, x2.mT)


# -- convolutions ---------------------------------------------------------------------------------


def _positions(input: T, made: T | None, transposed: bool) -> int:
    """Where the filters are applied: at each element of the result, or of what is spread by a
    transposed convolution; padding counts as data."""
    at = input if transposed else made
    assert at is not None
    return at.shape[0] * math.prod(at.shape[2:])


def _convolution(
    weight: T,
    made: T,
    input: T | None = None,
    self: T | None = None,
    transposed: bool = False,
    **_: Any,
) -> int:
    x = input if self is None else self
    assert x is not None
    return 2 * weight.numel() * _positions(x, made, transposed)


def _transposed(weight: T, self: T, **_: Any) -> int:
    return 2 * weight.numel() * _positions(self, None, transposed=True)


def _convolution_backward(
    grad_output: T,
    weight: T,
    output_mask: Sequence[bool],
    input: T | None = None,
    self: T | None = None,
    transposed: bool = False,
    **_: Any,
) -> int:
    """The gradient of the input takes as many multiply-adds as the forward, and so does the
    weight's."""
    x = input if self is None else self
    assert x is not None
    return 2 * weight.numel() * _positions(x, grad_output, transposed) * sum(output_mask[:2])


def _of_time(self: T, weight: T, made: T, **_: Any) -> int:
    """`conv_tbc`: (time, batch, channels) by (kernel, channels, results)."""
    return 2 * weight.numel() * made.shape[0] * made.shape[1]


def _of_time_backward(self: T, weight: T, **_: Any) -> int:
    return 4 * weight.numel() * self.shape[0] * self.shape[1]


# -- recurrent layers -----------------------------------------------------------------------------


def _recurrent(x: T, weights: Sequence[T]) -> int:
    """Every token goes through every matrix once, whichever gate, layer and direction it is of."""
    tokens = x.numel() // x.shape[-1]
    return 2 * tokens * sum(w.numel() for w in weights if w.dim() > 1)


def _layers(params: Sequence[T], input: T | None = None, data: T | None = None, **_: Any) -> int:
    x = input if data is None else data
    assert x is not None
    return _recurrent(x, params)


def _cell(input: T, w_ih: T, w_hh: T, **_: Any) -> int:
    return _recurrent(input, (w_ih, w_hh))


def _cudnn(input: T, weight: Sequence[T], **_: Any) -> int:
    return _recurrent(input, weight)


def _cudnn_backward(
    input: T,
    weight: Sequence[T],
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    return _recurrent(input, weight) * (1 + bool(output_mask[3]))


def _mkldnn(input: T, weight0: T, weight1: T, **_: Any) -> int:
    return _recurrent(input, (weight0, weight1))


def _mkldnn_backward(input: T, weight1: T, weight2: T, **_: Any) -> int:
    return 2 * _recurrent(input, (weight1, weight2))


# -- linear algebra: LAPACK Working Note 41; Golub and Van Loan, Matrix Computations ---------------


def _each(matrix: T, flops: float) -> int:
    """Of every matrix in a batch of them."""
    return round(math.prod(matrix.shape[:-2]) * flops)


def _square(cubes: float, squares: float = 0.0, matrix: str = "A", right: str = "B") -> Formula:
    """Of an n × n matrix so many n³, and so many n² for each column of a right-hand side."""

    def formula(**given: Any) -> int:
        n: int = given[matrix].shape[-1]
        flops: float = cubes * n * given[matrix].numel()
        if squares:
            flops += squares * n * given[right].numel()
        return round(flops)

    return formula


def _qr(A: T, mode: str = "reduced", **_: Any) -> int:  # noqa: N803
    m, n = max(A.shape[-2:]), min(A.shape[-2:])
    once = 2 * m * n**2 - 2 / 3 * n**3
    return _each(A, once if mode == "r" else 2 * once)


def _svd(A: T, compute_uv: bool = True, **_: Any) -> int:  # noqa: N803
    m, n = max(A.shape[-2:]), min(A.shape[-2:])
    return _each(A, 14 * m * n**2 + 8 * n**3 if compute_uv else 4 * m * n**2 - 4 / 3 * n**3)


def _eigh(A: T, compute_v: bool = True, **_: Any) -> int:  # noqa: N803
    return _each(A, (9 if compute_v else 4 / 3) * A.shape[-1] ** 3)


def _fourier(self: T, dim: Sequence[int], made: T, **_: Any) -> int:
    """5 n log₂ n of a complex transform of n numbers, half of a real one."""
    whole = self if self.numel() >= made.numel() else made
    n = math.prod(whole.shape[d] for d in dim)
    real = not (self.is_complex() and made.is_complex())
    return round(5 * whole.numel() * math.log2(max(n, 1)) / (2 if real else 1))


# -- all of them ----------------------------------------------------------------------------------

_ATEN: dict[str, Formula] = {
    **dict.fromkeys(("mm", "bmm", "_int_mm", "_scaled_mm", "_scaled_mm_v2"), _pair("self", "mat2")),
    **dict.fromkeys(("addmm", "_addmm_activation"), _pair("mat1", "mat2")),
    **dict.fromkeys(("baddbmm", "addbmm"), _pair("batch1", "batch2")),
    "addmv": _pair("mat", "vec"),
    "mv": _pair("self", "vec"),
    "dot": _pair("self", "tensor"),
    "vdot": _pair("self", "other"),
    "addr": _outer,
    "matmul": _matmul,
    "matmul_backward": _matmul_backward,
    "_foreach_mm": _many,
    **dict.fromkeys(("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2"), _grouped_mm),
    **dict.fromkeys(("_weight_int8pack_mm", "_weight_int4pack_mm"), _packed),
    "_weight_int4pack_mm_for_cpu": _packed,
    **dict.fromkeys(("linear", "mkldnn_linear"), _linear),
    **dict.fromkeys(("linear_backward", "mkldnn_linear_backward"), _linear_backward),
    "_trilinear": _trilinear,
    **dict.fromkeys(("_cdist_forward", "_cdist_backward"), _distances),
    **dict.fromkeys(
        ("convolution", "_convolution", "convolution_overrideable", "cudnn_convolution"),
        _convolution,
    ),
    **dict.fromkeys(("mkldnn_convolution", "_conv_depthwise2d", "conv_depthwise3d"), _convolution),
    **dict.fromkeys(("_slow_conv2d_forward", "slow_conv3d_forward"), _convolution),
    **dict.fromkeys(("slow_conv_dilated2d", "slow_conv_dilated3d"), _convolution),
    **dict.fromkeys(("slow_conv_transpose2d", "slow_conv_transpose3d"), _transposed),
    "cudnn_convolution_transpose": _transposed,
    **dict.fromkeys(
        ("convolution_backward", "convolution_backward_overrideable", "_slow_conv2d_backward"),
        _convolution_backward,
    ),
    "conv_tbc": _of_time,
    "conv_tbc_backward": _of_time_backward,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _layers),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _cell),
    **dict.fromkeys(("_cudnn_rnn", "miopen_rnn"), _cudnn),
    **dict.fromkeys(("_cudnn_rnn_backward", "miopen_rnn_backward"), _cudnn_backward),
    "mkldnn_rnn_layer": _mkldnn,
    "mkldnn_rnn_layer_backward": _mkldnn_backward,
    **dict.fromkeys(("linalg_cholesky_ex", "cholesky"), _square(1 / 3, matrix="self")),
    **dict.fromkeys(("linalg_lu_factor_ex", "_linalg_det", "_linalg_slogdet"), _square(2 / 3)),
    "linalg_inv_ex": _square(2),
    "_linalg_solve_ex": _square(2 / 3, 2),
    "linalg_solve_triangular": _square(0, 1, matrix="self"),
    "triangular_solve": _square(0, 1, right="self"),
    "linalg_lu_solve": _square(0, 2, matrix="LU"),
    "lu_solve": _square(0, 2, matrix="LU_data", right="self"),
    "cholesky_solve": _square(0, 2, matrix="input2", right="self"),
    "linalg_qr": _qr,
    "_linalg_svd": _svd,
    "_linalg_eigh": _eigh,
    **dict.fromkeys(("_fft_c2c", "_fft_r2c", "_fft_c2r"), _fourier),
}
_FORMULAS: Mapping[str, Formula] = {
    **{
        f"aten::{name}": formula
        for name, formula in ({**attention_flops.FORMULAS, **_ATEN}).items()
    },
    "transformers::grouped_mm_fallback": _experts,
    "transformers::grouped_mm_fallback_backward": _experts_backward,
}
