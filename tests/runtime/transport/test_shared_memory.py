"""Tensors through memory that two processes see; and that training is the same without it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from pipecompile.compiler.ir.program import ValueSpec
from pipecompile.runtime.transport import shared_memory
from pipecompile.runtime.transport.neighbours import SWITCH
from pipecompile.runtime.transport.shared_memory import BLOCKS, IN_PACKET, SharedMemory
from pipecompile.runtime.transport.transport import Endpoint
from pipecompile.runtime.transport.wire import ALIGNED
from support import jobs, models, plain
from support.connected import of, open_files
from support.gang import Gang

LARGE = IN_PACKET  # floats: four times what fits into a packet


def ends() -> tuple[SharedMemory, SharedMemory]:
    here, there = of(2)
    return SharedMemory(here), SharedMemory(there)


def specs_of(values: Sequence[torch.Tensor]) -> list[ValueSpec]:
    return [ValueSpec(f"v{i}", tuple(v.shape), v.stride(), v.dtype) for i, v in enumerate(values)]


def sent(here: SharedMemory, there: SharedMemory, values: Sequence[torch.Tensor]) -> Any:
    here.send(1, 0, values, specs_of(values))
    return there.receive(0, 0, specs_of(values)).wait()


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any dtype and strides: transposed, with gaps, with repeated dimensions, empty."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
    shape = [*draw(st.lists(st.integers(0, 7), max_size=3)), draw(st.sampled_from([1, 3, 900]))]
    made = (torch.randn(shape) * 10).to(dtype)
    how = draw(st.sampled_from(["plain", "transposed", "gaps", "expanded"]))
    if how == "transposed":
        return made.transpose(0, -1)
    if how == "gaps":
        return made[..., ::2]
    return made.unsqueeze(0).expand(3, *shape) if how == "expanded" else made


@given(st.lists(st.lists(tensors(), min_size=1, max_size=4), min_size=1, max_size=5), st.data())
def test_values_arrive_as_they_were_in_any_order(
    messages: list[list[torch.Tensor]], data: st.DataObject
) -> None:
    here, there = ends()
    for values in messages:
        here.send(1, 0, values, specs_of(values))
    mails = [there.receive(0, 0, specs_of(values)) for values in messages]
    for i in data.draw(st.permutations(range(len(messages)))):
        for found, value in zip(mails[i].wait(), messages[i], strict=True):
            assert found.stride() == value.stride()
            assert found.dtype == value.dtype
            assert torch.equal(found, value)


def test_large_values_are_read_where_they_are_and_aligned() -> None:
    here, there = ends()
    values = [torch.randn(LARGE), torch.randn(3), torch.randn(LARGE, 2).T]
    found = sent(here, there, values)
    assert all(each.data_ptr() % ALIGNED == 0 for each in found)
    assert len({each.untyped_storage().data_ptr() for each in found}) == 1
    found[0].zero_()  # the receiver's own
    assert torch.equal(found[2], values[2])


def test_a_block_is_used_again_when_its_last_tensor_is_gone() -> None:
    here, there = ends()
    value = [torch.randn(LARGE)]
    (first,) = sent(here, there, value)
    part = first[1:3]
    (second,) = sent(here, there, value)
    assert second.data_ptr() != first.data_ptr()
    place = first.data_ptr()
    del first
    (third,) = sent(here, there, value)
    assert third.data_ptr() not in (place, second.data_ptr()), "a part of it is still read"
    del part
    (fourth,) = sent(here, there, value)
    assert fourth.data_ptr() == place
    assert torch.equal(fourth, value[0])


def test_messages_in_flight_are_not_limited_and_files_are_few() -> None:
    here, there = ends()
    before = open_files()
    count = 3 * BLOCKS + 1
    for number in range(count):
        here.send(1, 0, [torch.full((LARGE,), number)], specs_of([torch.zeros(LARGE).long()]))
    specs = specs_of([torch.zeros(LARGE).long()])
    mails = [there.receive(0, 0, specs) for _ in range(count)]
    found = [mail.wait()[0] for mail in reversed(mails)][::-1]
    assert [int(each[-1]) for each in found] == list(range(count))
    assert open_files() <= before + 2 * 4  # both ends of four segments


def test_segments_that_nobody_needs_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "IDLE", 10)
    here, there = ends()
    before = open_files()
    for size in range(LARGE, 40 * LARGE, 3 * LARGE):
        sent(here, there, [torch.randn(size)])
    for _ in range(12):
        (found,) = sent(here, there, [torch.randn(LARGE)])
    assert open_files() == before + 2
    del found


def test_a_forked_process_that_ends_frees_nothing() -> None:
    here, there = ends()
    (found,) = sent(here, there, [torch.randn(LARGE)])
    child = os.fork()
    if not child:
        del found
        os._exit(0)
    os.waitpid(child, 0)
    (other,) = sent(here, there, [torch.randn(LARGE)])
    assert other.data_ptr() != found.data_ptr()


# -- and without it -------------------------------------------------------------------------------


def trained_over_gloo(*how: Any, **options: Any) -> plain.Trained:
    """As `jobs.train`; what differs is how processes exchange."""
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "off"
    try:
        return jobs.train(*how, **options)
    finally:
        os.environ.pop(SWITCH)
        if before is not None:
            os.environ[SWITCH] = before


CASES = [
    (2, 1, {"schedule": "1f1b"}),
    pytest.param(1, 2, {"zero": 0}, marks=pytest.mark.slow),
    pytest.param(1, 3, {"zero": 1}, marks=pytest.mark.slow),
    pytest.param(2, 2, {"zero": 1}, marks=pytest.mark.slow),
    pytest.param(2, 2, {"zero": 2, "schedule": "zb_h1"}, marks=pytest.mark.slow),
    pytest.param(2, 2, {"zero": 3}, marks=pytest.mark.slow),
    pytest.param(2, 1, {"schedule": "zb_v", "virtual_stages": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("n_stages", "dp", "options"), CASES)
def test_training_over_gloo_has_the_same_bits(
    gang: Callable[[int], Gang], n_stages: int, dp: int, options: dict[str, Any]
) -> None:
    how = ("gpt2", n_stages, dp, 4, "adamw", 2)
    processes = gang(n_stages * dp)
    for near, far in zip(
        processes.run(jobs.train, *how, **options),
        processes.run(trained_over_gloo, *how, **options),
        strict=True,
    ):
        plain.assert_equal(near, far)


def messages_of_a_step(name: str) -> tuple[plain.Trained, int, int, int]:
    """A training over gloo, and of a run after it: values, sends, and messages."""
    *batches, more = models.batches(name, 8, 3)
    with mock.patch.dict(os.environ, {SWITCH: "off"}):
        pipe = jobs.pipeline(name, 2, 1, 4, schedule="1f1b")
        run = plain.train_pipeline(pipe, batches)
    sent, send = [], Endpoint.send

    def noted(end: Endpoint, src: int, dst: int, values: Any, specs: Any) -> None:
        sent.append(len(values))
        send(end, src, dst, values, specs)

    with (
        mock.patch.object(dist, "isend", wraps=dist.isend) as isend,
        mock.patch.object(Endpoint, "send", noted),
    ):
        pipe.forward_backward(more)
    return run, sum(sent), len(sent), isend.call_count


def test_gloo_carries_one_message_per_action(gang: Callable[[int], Gang]) -> None:
    """Of an encoder with a decoder, whose stages send several small values at once."""
    expected = jobs.train_plainly("bart", 1, 4, "adamw", 2)
    each = []
    for run, values, sends, messages in gang(2).run(messages_of_a_step, "bart"):
        plain.assert_equal(run, expected, whole=False)
        assert messages == sends > 0
        each.append(values / sends)
    assert max(each) > 1, "several at once"
