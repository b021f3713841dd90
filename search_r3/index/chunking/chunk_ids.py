"""Ids of chunks: unique for any set of documents' ids, even ones that look like ids of chunks."""

from __future__ import annotations

import re

NUMBERED = re.compile(r"#[1-9][0-9]*\Z")


def chunk_id(document: str, number: int, count: int) -> str:
    """The id of chunk `number`, from 1, of the `count` chunks of a document.

    A document's only chunk has the document's id, unless that ends in "#" and a number; all other chunks are called
    "document#number". So an id that ends in "#" and a number always names a chunk of the document before it, and no two
    chunks can share an id.
    """
    return document if count == 1 and not NUMBERED.search(document) else f"{document}#{number}"
