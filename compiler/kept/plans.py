"""The folder of plans that were made, so that a second run need not search for the same one."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from ..ir.errors import PlanError
from ..plan.plan import Plan
from .folder import drop_oldest, write
from .surroundings import versions

MOST_BYTES = 1 << 26  # of all files


class Plans:
    """Args:
    path: of the folder, which is made when something is written; None where nothing is kept.
    """

    def __init__(self, path: Path | None):
        self._path = path

    def find(self, *told: object) -> Plan | None:
        """The plan that was made.

        Args:
            told: all that it depends on, equal texts for equal values; nothing where that is not
                known.
        """
        with contextlib.suppress(PlanError):
            return Plan.load(self._path / _name(told)) if self._path and told else None
        return None

    def add(self, plan: Plan, *told: object) -> None:
        """Keep one, if the folder can be written."""
        if self._path is None or not told:
            return
        with contextlib.suppress(OSError):
            write(self._path / _name(told), plan.to_json().encode())
            drop_oldest(self._path, "*.json", MOST_BYTES)


def _name(told: tuple[object, ...]) -> str:
    return hashlib.sha256(repr((versions(), told)).encode()).hexdigest()[:40] + ".json"
