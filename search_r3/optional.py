"""Optional packages: imported where they are used, with a clear one-line error if they are missing."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from search_r3.errors import InputError, first_line


@contextmanager
def optional_imports(extra: str, purpose: str) -> Iterator[None]:
    """A context for imports from packages of the extra `extra`.

    Args:
        extra: an extra of this package in pyproject.toml.
        purpose: what needs it, used at the start of the message: "BM25", "the LangChain adapter".

    Raises:
        InputError: a package is missing, or cannot be imported.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).split(".")[0].replace("_", "-")
        raise InputError(f"{purpose} needs the package {package}; run: pip install 'search-r3[{extra}]'") from error
    except ImportError as error:
        raise InputError(
            f"{purpose} needs packages that cannot be imported ({first_line(error)}); run: pip install --upgrade "
            f"'search-r3[{extra}]'"
        ) from error


def require(module: str, extra: str, purpose: str) -> Any:
    """Import `module` of the extra `extra`; see `optional_imports`."""
    with optional_imports(extra, purpose):
        return importlib.import_module(module)
