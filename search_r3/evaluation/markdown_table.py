"""The Markdown tables of results: of systems, studies, rollouts and ablations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LEFT, RIGHT = "---", "---:"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: Sequence[int] = (0,)) -> str:
    """The lines of one table, its numbers to the right.

    Args:
        head, rows: the cells, which hold no "|"; every row has as many as the head.
        text_columns: the numbers of the columns that hold text, to the left.
    """
    lines = [
        "|" + "|".join(f" {name} " if name else " " for name in head) + "|",
        "|" + "|".join(LEFT if column in text_columns else RIGHT for column in range(len(head))) + "|",
        *("| " + " | ".join(cells) + " |" for cells in rows),
    ]
    return "\n".join(lines)
