"""Which plain numbers of batches change, so that programs get them as inputs."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping

from ...compiler.capture.batch import BatchSpec
from ...compiler.driver.compiled import Mode

VALUES = 4  # of a number that is no input, before it is said that each is traced


class Numbers:
    """Those of the batches of a run, by mode and name; every rank knows the same.

    Args:
        may: whether numbers may become inputs.
    """

    def __init__(self, may: bool):
        self._may = may
        self._seen: dict[tuple[Mode, str], set[str]] = defaultdict(set)
        self._inputs: dict[Mode, set[str]] = defaultdict(set)
        self._closed: dict[tuple[Mode, str], str] = {}
        self._said: set[str] = set()

    def inputs(self, mode: Mode) -> Collection[str]:
        """The names of those that are inputs."""
        return self._inputs[mode]

    def met(self, mode: Mode, spec: BatchSpec, runs: bool) -> list[str]:
        """A batch with these numbers among its constants; the names of those that become inputs, as
        it is their second value.

        Args:
            runs: it is run, and not only compiled for.
        """
        fresh = []
        for name, value in spec.numbers.items() if self._may else ():
            seen = self._seen[mode, name]
            if len(seen) <= VALUES:
                seen.add(repr(value))
            if type(value) is not float:
                self.close(mode, {name: f"it is a {type(value).__name__}, and no float"})
            if (mode, name) in self._closed:
                self._tell(mode, name, len(seen))
            elif runs and len(seen) > 1:
                self._inputs[mode].add(name)
                fresh.append(name)
        return fresh

    def close(self, mode: Mode, why: Mapping[str, str]) -> None:
        """Some are no inputs, from now on.

        Args:
            why: the name of each -> why.
        """
        self._inputs[mode].difference_update(why)
        self._closed |= {(mode, name): text for name, text in why.items()}

    def _tell(self, mode: Mode, name: str, values: int) -> None:
        if values > VALUES and name not in self._said:
            self._said.add(name)
            warnings.warn(
                f"the batch's {name!r} is a number that changes, and each value of it is traced, "
                f"as {self._closed[mode, name]}: give it as a tensor without dimensions "
                "(torch.tensor(0.5))",
                stacklevel=2,
            )
