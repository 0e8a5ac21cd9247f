"""Tables as rows of text, the head first: aligned for a terminal, or in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Table = Sequence[Sequence[str]]


def number(value: float) -> str:
    """Three digits at least, and never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def aligned(rows: Table) -> str:
    """A table for the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def markdown(rows: Table) -> str:
    """A table for a page."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
