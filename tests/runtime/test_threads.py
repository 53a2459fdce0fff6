"""One pipeline, two threads: the second is refused, and the first goes on as if alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipecompile import errors
from support.checkpoints import OPTIMIZERS, rows, small
from support.plain import equal

CALLS: dict[str, Callable[[Any, Path], Any]] = {
    "step()": lambda pipe, path: pipe.step(rows(1)),
    "save()": lambda pipe, path: pipe.save(path),
    "load()": lambda pipe, path: pipe.load(path),
    "evaluate()": lambda pipe, path: pipe.evaluate(rows(1)),
    "zero_grad()": lambda pipe, path: pipe.zero_grad(),
    "end_step()": lambda pipe, path: pipe.end_step(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_thread_is_refused(tmp_path: Path, name: str) -> None:
    pipe, alone = (small(2, OPTIMIZERS["momentum"]) for _ in range(2))
    pipe.save(tmp_path)
    said: list[BaseException | None] = []

    def second() -> None:
        try:
            CALLS[name](pipe, tmp_path)
            said.append(None)
        except errors.StateError as error:
            said.append(error)

    def beside(*args: Any) -> None:  # in the middle of a step, between two of its parts
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    hook = pipe.optimizer.register_step_pre_hook(beside)
    losses = [pipe.step(rows(0)), alone.step(rows(0))]
    (error,) = said
    assert f"a thread calls {name} while another is in step() of the same pipeline" in str(error)
    assert equal(*losses)
    assert equal(pipe.state_dict(), alone.state_dict())
    hook.remove()
    pipe.forward_backward(rows(2))
    beside()  # and afterwards nobody is in the way
    assert said[1] is None
