"""Tables that stay readable in any width: words are not broken, and what does not fit goes into a further table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.cells import cell_len

from moekit.errors import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_GAP = 2
# A column of text may break words that are longer than this; the first column, which names the row, is kept whole.
_LONGEST_WORD = 20
_LONGEST_NAME = 40


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]
) -> None:
    """Print a table, or several with the same first column where the terminal is too narrow for all columns.

    Args:
        console: where to.
        title: above it; empty for none.
        columns: headings.
        rows: of cells.
        numeric: for each column, whether it holds numbers, which stand to the right.
    """
    body = [tuple(map(printable, row)) for row in rows]
    heads = [printable(column) for column in columns]
    cells = [[row[c] for row in body] for c in range(len(heads))]
    least = [_least(heads[c], cells[c], numeric[c], first=c == 0) for c in range(len(heads))]
    natural = [max(map(cell_len, [heads[c], *cells[c]])) for c in range(len(heads))]
    for number, block in enumerate(_blocks(least, console.width)):
        room = console.width - _GAP * (len(block) - 1)
        widths = _fit([natural[c] for c in block], [least[c] for c in block], room)
        name = printable(title) if number == 0 else ""
        # A line between parts; the parts of one table belong together.
        if number:
            console.print()
        chosen = [[row[c] for c in block] for row in body]
        console.print(_table(name, [heads[c] for c in block], chosen, [numeric[c] for c in block], widths))


def _least(head: str, cells: Sequence[str], numeric: bool, *, first: bool) -> int:
    """Narrowest width in which nothing is cut."""
    words = max(map(cell_len, head.split()), default=1)
    if numeric:
        return max([words, *map(cell_len, cells)])
    if first:
        return max(words, min(max(map(cell_len, cells), default=0), _LONGEST_NAME))
    longest = max((cell_len(word) for cell in cells for word in cell.split()), default=0)
    return max(words, min(longest, _LONGEST_WORD))


def _blocks(least: Sequence[int], width: int) -> list[list[int]]:
    """Columns of each part; every part begins with the first column."""
    blocks, used = [[0]], least[0]
    for column in range(1, len(least)):
        needed = _GAP + least[column]
        if used + needed > width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = least[0]
        blocks[-1].append(column)
        used += needed
    return blocks


def _fit(natural: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Widths: what each column wants if there is room, else what it needs and a share of the rest."""
    if sum(natural) <= room:
        return list(natural)
    wanted = [max(0, n - m) for n, m in zip(natural, least, strict=True)]
    spare = max(0, room - sum(least))
    return [m + spare * w // max(1, sum(wanted)) for m, w in zip(least, wanted, strict=True)]


def _table(
    title: str, heads: Sequence[str], rows: Sequence[Any], numeric: Sequence[bool], widths: Sequence[int]
) -> Table:
    from rich.table import Table
    from rich.text import Text

    # Texts, not strings: rich would take [red] in a name for markup.
    heading = Text(title) if title else None
    table = Table(title=heading, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for head, number, width in zip(heads, numeric, widths, strict=True):
        justify: Literal["left", "right"] = "right" if number else "left"
        table.add_column(Text(head), justify=justify, overflow="fold", width=width, vertical="top")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
