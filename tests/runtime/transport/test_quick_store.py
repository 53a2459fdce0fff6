"""A store that does not answer keeps nobody, at the end of a process neither."""

from __future__ import annotations

import subprocess
import sys

import pytest

ENDS = """
import atexit, sys, threading
atexit.register(lambda: print("Python ends"))
from pipecompile.runtime.transport import quick_store
from pipecompile.runtime.transport.doing import ENDED, FAILED, HERE

quick_store.ANSWER_S = 0.1

class Store:
    def check(self, keys):
        return sys.argv[1] == "answers" or threading.Event().wait()

store = quick_store.QuickStore(Store())
try:
    store.check(["a"])
except quick_store.StoreSilentError:
    print("silent")
HERE.end(ENDED if sys.argv[2] == "ended" else FAILED)
sys.exit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("store", "fate", "said", "status"),
    [
        ("silent", "failed", ["silent"], 1),
        ("silent", "ended", ["silent", "Python ends"], 3),
        ("answers", "failed", ["Python ends"], 3),
    ],
)
def test_a_failed_process_leaves_a_thread_in_the_store_behind(
    store: str, fate: str, said: list[str], status: int
) -> None:
    """Else the thread would come back to a Python that is no more, and abort: status -6."""
    ended = subprocess.run(
        [sys.executable, "-c", ENDS, store, fate], capture_output=True, text=True, timeout=60
    )
    assert (ended.stdout.splitlines(), ended.returncode) == (said, status), ended.stderr
