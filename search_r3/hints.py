"""The nearest known name, for the message about an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A question about the name of `known` that is nearest to `name`, to put into a message; "" if none is near.

    Args:
        cutoff: similarity from 0 to 1 (difflib's ratio) that a near name has at least.

    >>> f"unknown engine 'int9'; {did_you_mean('int9', ['torch', 'int8'])}choose torch or int8"
    "unknown engine 'int9'; did you mean 'int8'? choose torch or int8"
    """
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}? " if near else ""
