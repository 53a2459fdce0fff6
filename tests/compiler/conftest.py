"""Tests of how graphs come about: what other tests have traced is not at hand in them."""

from __future__ import annotations

from pathlib import Path

import pytest

_TRACE = ("answers", "capture", "driver", "effects", "rows", "tracing")


@pytest.fixture(autouse=True)
def _anew(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path(request.path).parent.name in _TRACE:
        monkeypatch.setenv("PIPECOMPILE_CACHE", "off")
