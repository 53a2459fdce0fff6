"""Which tests one worker of xdist has, with `--dist loadgroup`.

xdist tells its workers' tests apart by names to which it adds their groups, and pytest 9.2 no
longer reads what it sets: there every worker would start gangs. So workers leave the names of such
tests in the folder of the run, where the process that hands them out finds them.

All other tests of a file are one worker's too: it makes once what they share.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from xdist.scheduler import LoadGroupScheduling

from support.folder import shared


class Groups(LoadGroupScheduling):
    """One group of all tests that use gangs, and one of the others of each file."""

    @cached_property
    def gangs(self) -> set[str]:
        return set(_file().read_text().splitlines())

    def _split_scope(self, nodeid: str) -> str:
        return "gangs" if nodeid in self.gangs else nodeid.partition("::")[0]


def tell(gangs: Iterable[str]) -> None:
    """Called by workers, all of which have collected the same."""
    beside = _file().with_suffix(f".{os.getpid()}")
    beside.write_text("\n".join(gangs))
    beside.replace(_file())


def _file() -> Path:
    return shared() / "gangs.txt"
