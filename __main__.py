"""`python -m pipecompile`."""

from __future__ import annotations

import sys

from .compiler.cli.main import main

sys.exit(main())
