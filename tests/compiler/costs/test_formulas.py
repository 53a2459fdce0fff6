"""FLOPs of operators one by one, and what is said of those that have no formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (has operators of its own)
from pipecompile.compiler.cli.main import main
from pipecompile.compiler.costs.cost import node_flops, unpriced
from pipecompile.compiler.costs.formulas import flops_of, lacking
from pipecompile.compiler.costs.hardware import CPU
from pipecompile.compiler.ir.graph import Phase
from pipecompile.compiler.ir.region import work_of
from support.matrix import quickly
from support.units import captured
from torch import nn
from torch.utils.flop_counter import register_flop_formula

aten: Any = torch.ops.aten


def flops(op: Any, *args: Any, **kwargs: Any) -> int | None:
    """Of one call on the meta device, which makes the result."""
    return flops_of(op, args, kwargs, op(*args, **kwargs))


def of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


PRODUCTS = [
    (aten.mm.default, (of(3, 5), of(5, 7)), 2 * 3 * 5 * 7),
    (aten.addmm.default, (of(7), of(3, 5), of(5, 7)), 2 * 3 * 5 * 7),
    (aten.bmm.default, (of(4, 3, 5), of(4, 5, 7)), 2 * 4 * 3 * 5 * 7),
    (aten.baddbmm.default, (of(4, 3, 7), of(4, 3, 5), of(4, 5, 7)), 2 * 4 * 3 * 5 * 7),
    (aten.addbmm.default, (of(3, 7), of(4, 3, 5), of(4, 5, 7)), 2 * 4 * 3 * 5 * 7),
    (aten.mv.default, (of(3, 5), of(5)), 2 * 3 * 5),
    (aten.addmv.default, (of(3), of(3, 5), of(5)), 2 * 3 * 5),
    (aten.dot.default, (of(5), of(5)), 2 * 5),
    (aten.vdot.default, (of(5), of(5)), 2 * 5),
    (aten.addr.default, (of(3, 5), of(3), of(5)), 2 * 3 * 5),
    (aten.matmul.default, (of(2, 4, 3, 5), of(5, 7)), 2 * 8 * 3 * 5 * 7),
    (aten.linear.default, (of(2, 3, 5), of(7, 5), of(7)), 2 * 6 * 5 * 7),
    (aten._int_mm.default, (of(32, 16, dtype=torch.int8), of(16, 8, dtype=torch.int8)), 2 * 4096),
    (aten._cdist_forward.default, (of(2, 3, 5), of(2, 7, 5), 2.0, None), 2 * 2 * 3 * 7 * 5),
    (aten.linalg_inv_ex.default, (of(2, 6, 6),), 2 * 2 * 6**3),
    (aten._linalg_solve_ex.default, (of(2, 6, 6), of(2, 6, 5)), 2 * (144 + 2 * 36 * 5)),
    (aten.linalg_cholesky_ex.default, (of(2, 6, 6),), 2 * 72),
    (aten.linalg_solve_triangular.default, (of(6, 6), of(6, 5)), 36 * 5),
    (aten.linalg_qr.default, (of(8, 6),), 2 * (2 * 8 * 36 - 144)),
    (aten._fft_r2c.default, (of(3, 16), [1], 0, True), 3 * 5 * 16 * 4 // 2),
]


@pytest.mark.parametrize(
    ("op", "args", "expected"), PRODUCTS, ids=lambda x: getattr(x, "__name__", "")
)
def test_flops_of_a_product(op: Any, args: tuple[Any, ...], expected: int) -> None:
    named = {"upper": False} if op is aten.linalg_solve_triangular.default else {}
    assert flops(op, *args, **named) == expected


def test_products_in_groups() -> None:
    """Each row counts with the matrix of its own group, whichever operand has the groups."""
    half = torch.bfloat16
    ends = of(4, dtype=torch.int32)
    rows, experts = of(48, 16, dtype=half), of(4, 16, 32, dtype=half)
    made = of(48, 32, dtype=half)
    grouped = aten._grouped_mm.default
    assert flops_of(grouped, (rows, experts, ends), {}, made) == 2 * 48 * 16 * 32
    across = (rows.mT, made, ends)  # gradients of the experts
    assert flops_of(grouped, across, {}, experts) == 2 * 48 * 16 * 32
    columns = (experts.mT, rows.mT, ends)  # (4, 32, 16) × (16, 48)
    assert flops_of(grouped, columns, {}, made.mT) == 2 * 48 * 16 * 32
    alike = (of(4, 8, 16, dtype=half), experts)
    assert flops_of(grouped, alike, {}, of(4, 8, 32)) == 2 * 4 * 8 * 16 * 32
    fallback = torch.ops.transformers
    assert flops_of(fallback.grouped_mm_fallback.default, (rows, experts, ends), {}, made) == (
        2 * 48 * 16 * 32
    )
    back = fallback.grouped_mm_fallback_backward.default
    assert flops_of(back, (rows, experts, ends, made), {}, (rows, experts)) == 4 * 48 * 16 * 32


def attention(
    width: int = 8, values: int = 8, queries: int = 6, keys: int = 6
) -> list[torch.Tensor]:
    """Two rows of four query heads, and two heads of keys and values."""
    return [of(2, 4, queries, width), of(2, 2, keys, width), of(2, 2, keys, values)]


KERNELS = {
    "flash_attention": (0.0,),
    "flash_attention_for_cpu": (0.0,),
    "efficient_attention": (None, True, 0.0),
    "cudnn_attention": (None, True, 0.0),
    "fused_attention_overrideable": (None, 0.0),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [6, 9, 4])
def test_flops_of_fused_attention(name: str, causal: bool, keys: int) -> None:
    """Two products forward and five backward; the values are wider than the keys."""
    q, k, v = attention(8, 12, 6, keys)
    op = getattr(aten, f"_scaled_dot_product_{name}").default
    pairs = sum(min(i + 1, keys) for i in range(6)) if causal else 6 * keys
    made = (of(2, 4, 6, 12), of(2, 4, 6))
    given = (q, k, v, *KERNELS[name], causal)
    assert flops_of(op, given, {}, made) == 2 * 8 * pairs * (8 + 12)
    back = getattr(aten, f"_scaled_dot_product_{name}_backward").default
    names = [a.name for a in back._schema.arguments]
    grad = next(n for n in names if n.startswith("grad_out"))
    told = {grad: made[0], "query": q, "key": k, "value": v, "is_causal": causal}
    assert flops_of(back, (), told, (q, k, v)) == 2 * 8 * pairs * (3 * 8 + 2 * 12)


def test_attention_of_rows_with_their_own_lengths() -> None:
    """(tokens, heads, width): no query sees more keys than the longest row has."""
    q = of(20, 4, 8)
    ends = of(4, dtype=torch.int32)  # three rows
    flash, made = aten._flash_attention_forward.default, (of(20, 4, 8),)
    assert flops_of(flash, (q, q, q, ends, ends, 10, 10, 0.0, False, False), {}, made) == (
        2 * 4 * 20 * 10 * 16
    )
    whole = of(2, 6, 4, 8)  # (batch, tokens, heads, width)
    args = (whole, whole, whole, None, None, 6, 6, 0.0)
    assert flops_of(flash, (*args, False, False), {}, made) == 2 * 2 * 4 * 36 * 16
    assert flops_of(flash, (*args, True, False), {}, made) == 2 * 2 * 4 * 21 * 16
    window = {"window_size_left": 1, "window_size_right": 0}
    assert flops_of(flash, (*args, False, False), window, made) == 2 * 2 * 4 * (1 + 5 * 2) * 16
    efficient = aten._efficient_attention_forward.default
    args = (whole, whole, whole, None, None, None, 6, 6, 0.0)
    assert flops_of(efficient, (*args, 0), {}, made) == 2 * 2 * 4 * 36 * 16
    assert flops_of(efficient, (*args, 1), {}, made) == 2 * 2 * 4 * 21 * 16


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mask", [(True, True, True), (False, True, True), (True, False, False)])
def test_flops_of_a_convolution(groups: int, transposed: bool, mask: tuple[bool, ...]) -> None:
    """Filters are applied where there is a result, transposed ones where there is an input; the
    backward has the gradients that are asked for."""
    x = of(2, 8, 10, 10)
    weight = of(8, 16 // groups, 3, 3) if transposed else of(16, 8 // groups, 3, 3)
    rest = ([2, 2], [1, 1], [1, 1], transposed, [0, 0], groups)
    made = aten.convolution.default(x, weight, None, *rest)
    points = 100 if transposed else made.shape[-1] ** 2
    expected = 2 * 2 * points * 9 * 8 * 16 // groups
    assert flops_of(aten.convolution.default, (x, weight, None, *rest), {}, made) == expected
    back = (made, x, weight, [0], *rest, mask)
    assert flops(aten.convolution_backward.default, *back) == expected * sum(mask[:2])


KINDS = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
RECURRENT = [(k, n, both) for k, n in KINDS.items() for both in (False, True)]


@pytest.mark.parametrize(("kind", "gates", "both_ways"), quickly([(nn.LSTM, 4, True)], RECURRENT))
def test_flops_of_recurrent_layers(kind: Any, gates: int, both_ways: bool) -> None:
    """As operators, and as the graph has them."""
    with torch.device("meta"):
        layer = kind(6, 5, num_layers=2, batch_first=True, bidirectional=both_ways)
    ways = 1 + both_ways
    per_token = ways * gates * 5 * (6 + 5) + ways * gates * 5 * (5 * ways + 5)
    state: Any = of(2 * ways, 3, 5)
    op = {nn.LSTM: aten.lstm, nn.GRU: aten.gru, nn.RNN: aten.rnn_tanh}[kind].input
    state = [state, state] if kind is nn.LSTM else state
    given = (of(3, 7, 6), state, list(layer.parameters()), True, 2, 0.0, True, both_ways, True)
    assert flops_of(op, given, {}, None) == 2 * 3 * 7 * per_token
    graph = captured(_Recurrent(layer), of(3, 7, 6))
    forward = sum(map(node_flops, graph.ops(Phase.FORWARD)))
    assert forward == pytest.approx(2 * 3 * 7 * per_token, rel=0.005)


class _Recurrent(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.layer(x)[0]
        return made.square().mean()


def test_mkldnn_layers() -> None:
    w, x = (of(20, 6), of(20, 5), of(20), of(20)), of(7, 3, 6)
    names = {f"weight{i}": each for i, each in enumerate(w)}
    forward = aten.mkldnn_rnn_layer.default
    assert flops_of(forward, (), {"input": x, **names}, None) == 2 * 21 * 20 * 11
    names = {f"weight{i + 1}": each for i, each in enumerate(w)}
    back = aten.mkldnn_rnn_layer_backward.default
    assert flops_of(back, (), {"input": x, **names}, None) == 4 * 21 * 20 * 11


def test_bilinear_layers() -> None:
    with torch.device("meta"):
        layer = nn.Bilinear(6, 5, 4)
    graph = captured(_Paired(layer), of(7, 11))
    forward = sum(map(node_flops, graph.ops(Phase.FORWARD)))
    assert forward == 2 * 7 * 4 * 6 * 5


class _Paired(nn.Module):
    def __init__(self, layer: nn.Bilinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.layer(x[:, :6], x[:, 6:])
        return made.square().mean()


# -- without a formula ----------------------------------------------------------------------------


@torch.library.custom_op("tests::mixes", mutates_args=())
def mixes(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


@mixes.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[-1])


mixes.register_autograd(
    lambda ctx, grad: (grad.clone(), grad[: grad.shape[1]].clone()),
    setup_context=lambda ctx, inputs, output: None,
)


class _Mixer(nn.Module):
    """Beside a layer of ``wide`` columns."""

    def __init__(self, d: int, wide: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d, d))
        self.layer = nn.Linear(d, wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(mixes(x, self.weight)).square().mean()


def test_an_operator_without_a_formula_is_named() -> None:
    """One that could take a share of the step, and not where it is small beside the rest."""
    with torch.device("meta"):
        model, x = _Mixer(512, 512), torch.zeros(512, 512)
    note = unpriced(captured(model, x).ops(), CPU)
    assert note.startswith("no formula for tests.mixes (1 ×): counted as memory traffic")
    with torch.device("meta"):
        model, x = _Mixer(8, 1 << 20), torch.zeros(64, 8)
    assert unpriced(captured(model, x).ops(), CPU) == ""


def test_every_product_of_aten_has_a_formula_or_is_named() -> None:
    assert lacking(aten.linalg_matrix_exp.default) == "aten.linalg_matrix_exp"
    assert lacking(aten._thnn_fused_gru_cell.default) == "aten._thnn_fused_gru_cell"
    known = (aten.mm.default, aten.addmm_.default, aten.convolution.default, aten.lstm.input)
    ordinary = (aten.cat.default, aten._softmax.default, aten.lgamma.default, aten.sort.default)
    ordinary += (aten.upsample_bilinear2d.default, aten.linalg_vector_norm.default)
    assert [op for op in (*known, *ordinary) if lacking(op)] == []


def test_the_plan_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And not where torch was told a formula."""
    file = tmp_path / "mixing.py"
    file.write_text(_SPEC)
    command = f"inspect {file}:build --stages 2 --microbatches 2"
    assert main(command.split()) == 0
    report = " ".join(capsys.readouterr().out.split())
    assert "costs: no formula for spec.mixes (2 ×): counted as memory traffic" in report
    assert "compute: 0 FLOP forward" in report
    formula = register_flop_formula(torch.ops.spec.mixes)
    formula(lambda x, weight, **_: 2 * x[0] * x[1] * weight[1])
    assert main(command.split()) == 0
    report = " ".join(capsys.readouterr().out.split())
    assert "no formula" not in report
    assert "compute: 16.8 MFLOP forward" in report  # 2 operators, 64 rows of 256


_SPEC = """
import torch
from torch import nn

if not hasattr(torch.ops.spec, "mixes"):
    @torch.library.custom_op("spec::mixes", mutates_args=())
    def mixes(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight
    mixes.register_fake(lambda x, weight: torch.empty_like(x))
    mixes.register_autograd(
        lambda ctx, grad: (grad.clone(), grad.mean() * torch.ones(256, 256)),
        setup_context=lambda ctx, inputs, output: None,
    )

class Mixers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.zeros(256, 256)) for _ in range(2))
    def forward(self, x):
        for weight in (self.first, self.second):
            x = torch.ops.spec.mixes(x, weight).tanh()
        return x.square().mean()

def build():
    return Mixers(), torch.zeros(64, 256)
"""


class _Attends(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 1e9):  # cannot be traced
            return x
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


class _Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), _Attends()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.inner(self.first(x)).square().mean()
        return made


def test_what_runs_eagerly_is_counted_by_the_same_formulas() -> None:
    graph = captured(_Around(), torch.randn(2, 4, 16, 8), ("inner",))
    work = [region for node in graph.ops() if (region := work_of(node)) is not None]
    pairs = 2 * 4 * 16 * 17 // 2
    assert [region.flops for region in work] == [2 * pairs * 16, 2 * pairs * 40]
