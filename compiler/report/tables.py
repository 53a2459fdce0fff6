"""Lines and tables that fit a width, in rich's terms."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

PADDINGS = (2, 1)
"""Columns of space between cells: what is usual, and where a table is too wide for that."""
LEAST_LAST = 24
"""Columns that the last cell of a row is left at least, in which it may wrap."""

Columns = Mapping[str, Sequence[object]]
"""Head -> cells, all columns as long as each other."""


def lines(title: str, texts: Sequence[str], width: int, mark: str = "") -> Text:
    """A title and one paragraph per text, indented; no line is wider than the width."""
    found = Text("\n".join(textwrap.wrap(title, width)), style="bold")
    for text in texts:
        wrapped = textwrap.wrap(
            text,
            width,
            initial_indent=f"  {mark}",
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
        found.append("\n" + "\n".join(wrapped), style="not bold")
    return found


def table(columns: Columns, width: int, left: Sequence[str] = ()) -> RenderableType:
    """One column per head; the last one may wrap, the others do not.

    What is too wide becomes several tables below each other, each with the first column.

    Args:
        left: heads of the columns that are texts.
    """
    wholes = [each for each in PADDINGS if _width(columns, each, whole=True) <= width]
    wraps = [each for each in PADDINGS if _width(columns, each) <= width]
    padding = next(iter(wholes + wraps), PADDINGS[-1])
    parts = [_made(part, padding, left) for part in _parts(columns, width, padding)]
    if len(parts) == 1:
        return parts[0]
    spaced = [each for part in parts for each in (part, Text())]
    return Group(*spaced[:-1])


def rest(columns: Columns, width: int) -> int:
    """Columns of characters that a table leaves for one more cell per row."""
    return width - _width(columns, PADDINGS[0], whole=True) - PADDINGS[0]


def _made(columns: Columns, padding: int, left: Sequence[str]) -> Table:
    made = Table(box=None, pad_edge=False, padding=(0, padding, 0, 0), header_style="bold")
    for name in columns:
        last = name == list(columns)[-1]
        justify = "left" if name in left else "right"
        made.add_column(name, justify=justify, no_wrap=not last, overflow="fold")  # type: ignore[arg-type]
    for row in zip(*columns.values(), strict=True):
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made


def _parts(columns: Columns, width: int, padding: int) -> Iterator[Columns]:
    """The columns in as many tables as it takes."""
    first, *names = columns
    part = {first: columns[first]}
    for name in names:
        more = part | {name: columns[name]}
        if len(part) > 1 and _width(more, padding) > width:
            yield part
            more = {first: columns[first], name: columns[name]}
        part = more
    yield part


def _width(columns: Columns, padding: int, whole: bool = False) -> int:
    """Of a table, with as little of the last column as may be, or with the whole of it."""
    wide = [_cell_width(name, cells) for name, cells in columns.items()]
    if not whole:
        head = max(map(len, list(columns)[-1].split("\n")))
        wide[-1] = min(wide[-1], max(LEAST_LAST, head))
    return list(accumulate(wide, lambda a, b: a + padding + b))[-1]


def _cell_width(name: str, cells: Sequence[object]) -> int:
    texts = [*name.split("\n"), *(str(cell) for cell in cells)]
    return max(map(len, texts))
