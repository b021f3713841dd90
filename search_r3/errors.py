"""The one exception that means "what you gave us is wrong", as opposed to "our code is wrong".

The command line prints its message as a single line and exits with code 2; a library user catches it as a
`ValueError`. Every message names the bad value, says what was expected, and says what to do.
"""

from __future__ import annotations


class InputError(ValueError):
    """Bad input from the user: a missing file, a broken line, an unknown key, the wrong checkpoint."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, for use in our messages; its type's name if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
