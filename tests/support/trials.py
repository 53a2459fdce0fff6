"""A trial that trains nothing, for processes that import it."""

from __future__ import annotations

import os
import time

from pipecompile.compiler.zoo.families import Architecture
from pipecompile.compiler.zoo.trial import Outcome


def quick(architecture: Architecture, stages: int) -> Outcome:
    """Right at once, but for ``slow`` and ``dies``."""
    if architecture.name == "slow":
        time.sleep(60)
    if architecture.name == "dies":
        os._exit(3)
    return Outcome(architecture.family, architecture.name, "right", parameters=stages)
