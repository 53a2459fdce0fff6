"""`python -m pipecompile`."""

from __future__ import annotations

from .compiler.cli.main import run

run()
