"""Where the processes of one run of the tests find what the others have left."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = "PIPECOMPILE_TEST_GRAPHS"


def shared() -> Path:
    return Path(os.environ[FOLDER])
