"""The full-text index: LanceDB's BM25 over every word of title and text, in any language.

ICU's dictionaries also segment Chinese, Japanese and Thai. LanceDB's defaults would leave out the stop words of many
languages at once (the German "war" and "die", the Danish "man"), and words of 40 bytes or more.
"""

from __future__ import annotations

from typing import Any

from search_r3.index.index_info import FullText
from search_r3.index.row_keys import CONTENT

TOKENIZER: dict[str, Any] = {"base_tokenizer": "icu/split", "remove_stop_words": False, "max_token_length": None}
"""Parameters of LanceDB's `FTS`. No length limit is needed to bound memory, as no word is longer than a chunk."""


def full_text_state(table: Any) -> FullText:
    """The state of a table's full-text index; "outdated" means made with other parameters than `TOKENIZER`."""
    for index in table.list_indices():
        if CONTENT in index.columns:
            details = getattr(index, "index_details", None) or {}
            same = all(details[name] == value for name, value in TOKENIZER.items() if name in details)
            return "current" if same else "outdated"
    return "missing"


def ensure_full_text(table: Any, rebuild: bool = True) -> bool:
    """Create the full-text index if there is none; with `rebuild`, rebuild an outdated one, in one commit.

    Returns:
        Whether an outdated index was rebuilt.
    """
    state = full_text_state(table)
    if state == "missing" or (state == "outdated" and rebuild):
        from lancedb.index import FTS

        table.create_index(CONTENT, config=FTS(**TOKENIZER), replace=True)
    return state == "outdated" and rebuild
