"""Search-R3: retrieval that thinks before it embeds (arXiv 2510.07048).

>>> from search_r3 import SearchR3
>>> model = SearchR3.from_pretrained()  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from search_r3.errors import InputError

if TYPE_CHECKING:
    from search_r3.model.searchr3 import Reasoned, SearchR3

__version__ = "0.1.0"
__all__ = ["InputError", "Reasoned", "SearchR3", "__version__"]


def __getattr__(name: str) -> Any:
    """Load the heavy names on first use, so that `import search_r3` stays quick."""
    if name in ("SearchR3", "Reasoned"):
        from search_r3.model import searchr3

        return getattr(searchr3, name)
    raise AttributeError(f"module 'search_r3' has no attribute {name!r}")
