"""What the link between two processes carries."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pipecompile.compiler.costs.hardware import CPU
from pipecompile.compiler.costs.topology import Exchange
from pipecompile.runtime.exchange import link
from pipecompile.runtime.exchange.agreement import Agreement
from pipecompile.runtime.transport.mesh import connect, make_mesh
from pipecompile.runtime.transport.neighbours import meet
from pipecompile.runtime.transport.processes import Processes
from support.gang import Gang


def measured() -> tuple[tuple[float, float, float], float]:
    """The figures, and the seconds that measuring took."""
    device = torch.device("cpu")
    mesh = make_mesh(2, 1)
    connect(mesh, device)
    transport, agreement = Processes(mesh, device), Agreement(mesh, device)
    start = time.perf_counter()
    figures = link.measure_link(mesh, device, transport, agreement.gather)
    return figures, time.perf_counter() - start


def test_two_processes_agree_on_their_link(gang: Callable[[int], Gang]) -> None:
    (first, seconds), (second, _) = gang(2).run(measured)
    assert first == second
    bytes_per_s, latency_s, send_share = first
    assert 1e7 < bytes_per_s < 1e12
    assert 1e-7 < latency_s < 0.1
    assert 0 < send_share <= 1
    assert seconds < 5  # most of a second at worst, were the machine quiet


def exchanged(dp: int, n_stages: int, shared: bool) -> tuple[Exchange, float, float]:
    """The figures, the seconds that measuring took, and those of an agreement."""
    device, mesh = torch.device("cpu"), make_mesh(n_stages, dp)
    connect(mesh, device)
    agreement = Agreement(mesh, device)
    assert mesh.rank is not None
    neighbours = meet(mesh.rank, agreement.gather) if shared else None
    transport = Processes(mesh, device, neighbours)
    start = time.perf_counter()
    found = link.measure_exchange(transport, device, agreement.gather)
    transport.flush()
    seconds = time.perf_counter() - start
    return found, seconds, link.measure_agreement(device, agreement.gather)


@pytest.mark.parametrize(("dp", "n_stages", "shared"), [(2, 1, True), (2, 1, False), (3, 1, True)])
def test_replicas_agree_on_their_exchange(
    gang: Callable[[int], Gang], dp: int, n_stages: int, shared: bool
) -> None:
    """Through memory, where nobody but their processors does it, and over gloo."""
    found = gang(dp * n_stages).run(exchanged, dp, n_stages, shared)
    exchange, seconds, agree_s = found[0]
    assert {(each, agrees_s) for each, _, agrees_s in found} == {(exchange, agree_s)}
    assert 1e7 < exchange.bytes_per_s < 1e12
    assert 1e-7 < exchange.latency_s < 0.1
    assert exchange.share == 1 if shared else 0 < exchange.share <= 1
    assert seconds < 10
    assert 1e-6 < agree_s < 0.1


def test_small_messages_do_not_tell_what_large_ones_take_of_the_processor() -> None:
    """Of one that is empty nearly all is waiting."""
    assert link.share_of([1e-6, 1e-6, 9e-3], [1e-4, 1e-4, 1e-2]) == pytest.approx(0.88, abs=0.005)
    assert link.share_of([2e-3], [1e-3]) == 1.0


def test_parcels_have_several_gradients_of_about_so_many_bytes() -> None:
    for nbytes in link.SIZES[1:]:
        parcel = link._parcel(nbytes, 3)
        assert sum(parcel.sizes) * 4 == pytest.approx(nbytes, rel=0.02)
        assert len(parcel.items) == link.TOGETHER
        assert len(set(parcel.sizes)) == 1


def test_what_was_measured_is_what_an_exchange_costs() -> None:
    """A share of it is the processor's, so that programs are that much longer."""
    device = replace(CPU, exchange=Exchange(1e9, 1e-3, 0.5))
    assert device.collective_s(4e9, 4, 3) == pytest.approx(3 * 1e-3 + 3.0)
    assert device.together_s(1.0, 0.5) == pytest.approx(1.25)
    assert device.together_s(1.0, 4.0) == pytest.approx(4.0)


def test_the_line_through_exact_times() -> None:
    seconds = [50e-6 + n / 2e9 for n in link.SIZES]
    assert link.fit(link.SIZES, seconds) == pytest.approx((2e9, 50e-6))


def test_times_that_fall_with_size_still_give_figures() -> None:
    seconds = [1e-3 / (i + 1) for i in range(len(link.SIZES))]
    bytes_per_s, latency_s = link.fit(link.SIZES, seconds)
    assert bytes_per_s == pytest.approx(link.SIZES[-1] / seconds[-1])
    assert latency_s == min(seconds)
