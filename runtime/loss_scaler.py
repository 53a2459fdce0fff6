"""Dynamic loss scaling: the number that the loss is multiplied by before it is differentiated."""

from __future__ import annotations

from typing import Any

from ..compiler.errors import StateError
from ..compiler.precision import LossScale


class LossScaler:
    """Grows after good runs, backs off after one with a gradient that is not finite.

    Attributes:
        scale: now.
        skipped: how many runs had such a gradient.
    """

    def __init__(self, config: LossScale):
        self.config = config
        self.scale = config.init
        self.skipped = 0
        self._good = 0

    def update(self, finite: bool) -> None:
        """After a run: were the gradients of all stages and replicas finite?"""
        if not finite:
            self.scale *= self.config.backoff
            self.skipped += 1
            self._good = 0
            return
        self._good += 1
        if self._good == self.config.interval:
            self.scale *= self.config.growth
            self._good = 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "skipped": self.skipped, "good": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another left off.

        Raises:
            StateError: what is given is no scaler's state.
        """
        if set(state) != set(self.state_dict()):
            raise StateError(
                f"a loss scaler's state has {sorted(self.state_dict())}, not {sorted(state)}"
            )
        self.scale, self.skipped = float(state["scale"]), int(state["skipped"])
        self._good = int(state["good"])
