"""Ids of chunks: unique for any set of documents' ids, also of those that look like ids of chunks."""

from __future__ import annotations

import re
from typing import Any

NUMBERED = re.compile(r"#[1-9][0-9]*\Z")
OLD = "id = document AND regexp_like(id, '#[1-9][0-9]*$')"


def chunk_id(document: str, number: int, count: int) -> str:
    """The id of chunk `number`, from 1, of the `count` chunks of a document.

    The only chunk of a document has the document's id, unless this ends in "#" and a number; all others are
    "document#number". So an id that ends in a number always says which chunk it is of the document before it, and no
    two chunks can have the same.
    """
    return document if count == 1 and not NUMBERED.search(document) else f"{document}#{number}"


def rename_old_ids(table: Any) -> int:
    """Give the rows the ids of `chunk_id` that an earlier version gave others, in one commit; returns how many.

    They are those of documents of one chunk whose ids end in a number: another document's chunk could have replaced
    them. Their vectors stay.
    """
    count = int(table.count_rows(OLD))
    if count:
        table.update(where=OLD, values_sql={"id": "concat(id, '#1')"})
    return count
