"""Markdown tables of systems, studies, rollouts and ablations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LEFT, RIGHT = "---", "---:"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: Sequence[int] = (0,)) -> str:
    """A table with its numbers aligned right.

    Args:
        head, rows: the cells, without "|"; rows are as long as the head.
        text_columns: indices of the columns that contain text and are aligned left.
    """
    lines = [
        "|" + "|".join(f" {name} " if name else " " for name in head) + "|",
        "|" + "|".join(LEFT if column in text_columns else RIGHT for column in range(len(head))) + "|",
        *("| " + " | ".join(cells) + " |" for cells in rows),
    ]
    return "\n".join(lines)
