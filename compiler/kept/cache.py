"""What is kept between runs, by folder: graphs, plans, and what optimizers take."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .folder import Folder
from .optimizers import Optimizers
from .plans import Plans


def default_cache_dir() -> Path | None:
    """``PIPECOMPILE_CACHE``, else ``XDG_CACHE_HOME/pipecompile``, else ``~/.cache/pipecompile``;
    None where the first says "off", or there is no home."""
    if chosen := os.environ.get("PIPECOMPILE_CACHE"):
        return None if chosen == "off" else Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "pipecompile"
    try:
        return Path.home() / ".cache" / "pipecompile"
    except RuntimeError:  # neither HOME nor an entry of this user: then nothing is kept
        return None


@dataclass(frozen=True)
class Cache:
    """Attributes:
    path: None where nothing is kept.
    searches: whether plans are searched for even where another run has made one.
    """

    path: Path | None
    searches: bool = False

    @property
    def graphs(self) -> Folder | None:
        return None if self.path is None else Folder(self.path / "graphs")

    @property
    def plans(self) -> Plans:
        return Plans(None if self.path is None or self.searches else self.path / "plans")

    @property
    def optimizers(self) -> Optimizers:
        return Optimizers(None if self.path is None else self.path / "optimizers")
