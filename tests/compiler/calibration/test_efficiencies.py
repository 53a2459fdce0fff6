"""What tables say: shares of peaks, monotone in size, and where their numbers are from."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.calibration.forms import Attention, Product
from pipecompile.compiler.calibration.table import Table
from pipecompile.compiler.calibration.tables import GENERIC, TABLES, table_of

SIZES = st.integers(1, 20_000)
EVERY = [*TABLES.values(), GENERIC]


@pytest.mark.parametrize("table", EVERY, ids=lambda table: table.told)
@given(batch=st.integers(1, 64), m=SIZES, n=SIZES, k=SIZES)
def test_products_reach_a_share_of_their_peak(
    table: Table, batch: int, m: int, n: int, k: int
) -> None:
    form = Product(batch, m, n, k)
    share = table.products.efficiency(form, "bfloat16")
    assert 0 < share <= table.products.share_of("bfloat16") <= 1
    seconds = table.products.seconds(form, "bfloat16", 1e14)
    assert share == pytest.approx(form.flops / seconds / 1e14)


@pytest.mark.parametrize("table", EVERY, ids=lambda table: table.told)
@given(batch=st.integers(1, 64), m=SIZES, n=SIZES, k=SIZES, more=st.integers(1, 500), at=SIZES)
def test_larger_products_take_no_less(
    table: Table, batch: int, m: int, n: int, k: int, more: int, at: int
) -> None:
    field = ("batch", "m", "n", "k")[at % 4]
    small = Product(batch, m, n, k)
    large = dataclasses.replace(small, **{field: getattr(small, field) + more})
    assert table.products.unit_flops(small) <= table.products.unit_flops(large) * (1 + 1e-12)


def test_a_wave_that_is_not_full_takes_as_long() -> None:
    a100 = TABLES["a100"].products
    full = Product(1, 256 * 12, 128 * 9, 4096)  # 108 tiles on 108 multiprocessors
    more = Product(1, 256 * 12, 128 * 9 + 128, 4096)
    assert a100.efficiency(full, "") == pytest.approx(0.746 * 4096 / (4096 + 64))
    assert a100.seconds(more, "", 1e14) > 1.4 * a100.seconds(full, "", 1e14)


@pytest.mark.parametrize("table", EVERY, ids=lambda table: table.told)
@given(keys=st.integers(1, 200_000), more=st.integers(0, 9000), width=st.integers(1, 256))
def test_attention_reaches_more_with_length_and_width(
    table: Table, keys: int, more: int, width: int
) -> None:
    for backward in (False, True):
        short = Attention(8, keys, keys, width, backward)
        long = Attention(8, keys + more, keys + more, width + more % 7, backward)
        assert 0 < table.attention.efficiency(short) <= table.attention.efficiency(long) <= 1


@pytest.mark.parametrize("table", EVERY, ids=lambda table: table.told)
@given(
    nbytes=st.integers(1, 10**10),
    more=st.integers(0, 10**9),
    ranks=st.integers(2, 4096),
    others=st.integers(0, 64),
)
def test_collectives_take_longer_with_bytes_and_ranks(
    table: Table, nbytes: int, more: int, ranks: int, others: int
) -> None:
    small = table.network.collective_s(nbytes, ranks)
    assert 0 < small <= table.network.collective_s(nbytes + more, ranks)
    assert small <= table.network.collective_s(nbytes, ranks + others) * (1 + 1e-12)
    assert table.network.collective_s(nbytes, 1) == 0


def test_a_gather_of_two_machines_is_bound_by_what_leaves_them() -> None:
    network = TABLES["h100"].network
    within, between = network.collective_s(1e9, 8), network.collective_s(1e9, 16)
    assert within == pytest.approx(7 / 8 * 1e9 / 368e9 + 7e-6 + 30e-6)
    assert between == pytest.approx(15 / 16 * 1e9 / 360e9 + 14e-6 + 10e-6 + 30e-6)


@pytest.mark.parametrize("table", EVERY, ids=lambda table: table.told)
def test_every_number_has_a_source(table: Table) -> None:
    told = table.sources
    if "" in told:  # all of a generic table
        return
    parts = ("products", "attention", "network")
    for each in dataclasses.fields(Table):
        if each.name in ("told", "sources", "fused"):
            continue
        inner = (
            [f.name for f in dataclasses.fields(getattr(table, each.name))]
            if (each.name in parts)
            else []
        )
        for name in inner:
            assert f"{each.name}.{name}" in told or each.name in told, f"{each.name}.{name}"
        assert inner or each.name in told, each.name


def test_a_device_without_a_table_says_so() -> None:
    assert table_of("l4").told == "generic efficiency: there is no table for l4"
    assert table_of("l4").products == GENERIC.products
    assert table_of("h100") is TABLES["h100"]


@given(kernels=st.floats(0, 10), collectives=st.floats(0, 10))
def test_collectives_beside_kernels_are_hidden_but_for_a_share(
    kernels: float, collectives: float
) -> None:
    found = TABLES["a100"].together_s(kernels, collectives)
    assert max(kernels, collectives) <= found <= kernels + collectives + 1e-9
