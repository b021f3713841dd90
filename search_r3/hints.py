"""The nearest known name, for the message about an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from search_r3.errors import InputError


def nearest(name: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The name of `known` that is nearest to `name`; None if none is near.

    Args:
        cutoff: minimum similarity, from 0 to 1 (difflib's ratio).
    """
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A question suggesting the nearest name of `known`, for a message; "" if none is near.

    >>> f"there is no engine 'int9'; {did_you_mean('int9', ['torch', 'int8'])}choose torch or int8"
    "there is no engine 'int9'; did you mean 'int8'? choose torch or int8"
    """
    near = nearest(name, known)
    return f"did you mean {near!r}? " if near else ""


def refuse_unknown(given: Iterable[str], known: Sequence[str], where: str, what: str = "key") -> None:
    """Refuse the first of `given` that is not `known`, naming the nearest that is.

    Raises:
        InputError: there is one; `where` begins the message.
    """
    for name in given:
        if name not in known:
            near = nearest(name, known, cutoff=0.5)
            hint = f'did you mean "{near}"? ' if near else ""
            raise InputError(f'{where}: unknown {what} "{name}"; {hint}known: {", ".join(known)}')
