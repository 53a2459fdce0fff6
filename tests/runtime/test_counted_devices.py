"""Runs that are planned for devices of several kinds: the same bits, ranks where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from pipecompile.compiler.costs.cluster import Cluster
from pipecompile.compiler.costs.hardware import CPU
from pipecompile.compiler.ir.errors import OptionError
from support import jobs, models, plain
from support.gang import Gang

SLOW = replace(CPU, name="cpu with a third", flops_per_s={"float32": 5e9}, bytes_per_s=1e9)


def trained(cluster: Cluster, dp: int = 1) -> tuple[plain.Trained, tuple[str, ...], list[int]]:
    """Losses and all else, which rank had which device, and how much of the work each did."""
    batches = models.batches("llama", 8, 2)
    shared = {"example_batch": batches[0], "hardware": cluster, "memory": None}
    pipe = jobs.pipeline("llama", 2, dp, 4 // dp, optimizer=jobs.OPTIMIZERS["sgd"], **shared)
    flops = [stage.forward_flops for stage in pipe.plan.stages]
    run = plain.train_pipeline(pipe, batches)
    return run, pipe.plan.decision.devices, flops


def expected() -> plain.Trained:
    batches = models.batches("llama", 8, 2)
    return plain.train(models.build("llama"), batches, jobs.OPTIMIZERS["sgd"], 1, 4)


def test_unequal_devices_give_the_bits_of_one() -> None:
    run, devices, flops = trained(Cluster(((SLOW, 1), (CPU, 1))))
    plain.assert_equal(run, expected())
    fast = devices.index("cpu")
    assert flops[fast] > 1.5 * flops[1 - fast]


def test_processes_keep_the_devices_that_they_are_on(gang: Callable[[int], Gang]) -> None:
    """In either order of the list, although one of the two would be faster."""
    for cluster in (Cluster(((SLOW, 1), (CPU, 1))), Cluster(((CPU, 1), (SLOW, 1)))):
        answers: list[Any] = gang(2).run(trained, cluster)
        wanted = tuple(device.name for device in cluster.members)
        for run, devices, flops in answers:
            assert devices == wanted
            assert flops[wanted.index("cpu")] > flops[1 - wanted.index("cpu")]
            plain.assert_equal(run, expected(), whole=False)


def test_as_many_devices_as_ranks_are_needed() -> None:
    with pytest.raises(OptionError, match=r"has 3 devices, and n_stages=2 × dp=1 are 2 ranks"):
        trained(Cluster(((SLOW, 1), (CPU, 2))))
