"""One class per user mistake: those of `compiler/ir/errors.py`, where users look for them."""

from .compiler.ir.errors import *  # noqa: F403
