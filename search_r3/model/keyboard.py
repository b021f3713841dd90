"""Which keys are beside each other, for typos that are made and corrected."""

from __future__ import annotations

_KEY_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _neighbors() -> dict[str, str]:
    """The keys beside each key of a QWERTY keyboard: of its row, and of the rows above and below."""
    found: dict[str, str] = {}
    for row, keys in enumerate(_KEY_ROWS):
        for column, key in enumerate(keys):
            near = [(row, column - 1), (row, column + 1)]
            near += [(row - 1, column), (row - 1, column + 1), (row + 1, column - 1), (row + 1, column)]
            found[key] = "".join(
                _KEY_ROWS[r][c] for r, c in near if 0 <= r < len(_KEY_ROWS) and 0 <= c < len(_KEY_ROWS[r])
            )
    return found


NEIGHBORS = _neighbors()
"""Letter -> the letters beside it on a QWERTY keyboard."""
