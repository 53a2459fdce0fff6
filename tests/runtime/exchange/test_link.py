"""What the link between two processes carries."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from pipecompile.runtime.exchange import link
from pipecompile.runtime.exchange.agreement import Agreement
from pipecompile.runtime.transport.mesh import connect, make_mesh
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


def test_the_line_through_exact_times() -> None:
    seconds = [50e-6 + n / 2e9 for n in link.SIZES]
    assert link.fit(link.SIZES, seconds) == pytest.approx((2e9, 50e-6))


def test_times_that_fall_with_size_still_give_figures() -> None:
    seconds = [1e-3 / (i + 1) for i in range(len(link.SIZES))]
    bytes_per_s, latency_s = link.fit(link.SIZES, seconds)
    assert bytes_per_s == pytest.approx(link.SIZES[-1] / seconds[-1])
    assert latency_s == min(seconds)
