"""Who gets what the ranks of the last stage have: every rank, or the main one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...compiler.ir.errors import OptionError
from ..exchange.agreement import Agreement

ALL, MAIN = "all", "main"


def check_gather(gather: object) -> str:
    """Who: "all", "main", or "" for no other rank.

    Raises:
        OptionError: none of these.
    """
    if gather is True:
        return ALL
    if gather is False:
        return ""
    if gather in (ALL, MAIN):
        return str(gather)
    raise OptionError(
        f'gather={gather!r}: use "all" (or True) for outputs on every rank, "main" for rank 0 '
        "alone, or False for the ranks of the last stage, each its own rows"
    )


def shared(agreement: Agreement, mine: Any, who: str) -> Sequence[Any] | None:
    """What every process has, in rank order; None on a rank that is not to get it. A collective."""
    return agreement.gather(mine) if who == ALL else agreement.collect(mine)
