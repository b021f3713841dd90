#!/bin/sh
# lancedb 0.40.0: a full-text index with the base tokenizer "icu/split" loses words that are there.
#
# Expected: English text, language left at its default, so at most English stop words are dropped ("the", "is").
# Seen: the lists of many languages are applied at once, and a token of 40 bytes or more is dropped. Of these four
# queries only the first finds its row:
#   treaty: 1 row    war (in German, "was"): 0 rows    die: 0 rows    a hash of 40 digits: 0 rows
# With remove_stop_words=False and max_token_length=None all four find their row.
#
# In Search-R3: the index is made with both, and indexes that were made without are rebuilt at the next write
# (tests/index/test_index_words.py).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check lancedb==0.40.0 pyarrow==26.0.1
"$work/venv/bin/python" - "$work/db" <<'PYTHON'
import sys

import lancedb
from lancedb.index import FTS
from lancedb.query import MatchQuery

HASH = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
TEXTS = ["The Great War ended with a treaty in 1919.", "Stars die slowly.", f"The tree {HASH} is empty."]
QUERIES = ["treaty", "war", "die", HASH]


def found(table) -> list[int]:
    return [len(table.search(MatchQuery(q, "text"), query_type="fts").limit(10).to_list()) for q in QUERIES]


table = lancedb.connect(sys.argv[1]).create_table("t", data=[{"text": text} for text in TEXTS])
table.create_index("text", config=FTS(base_tokenizer="icu/split"))
default = found(table)
table.create_index("text", config=FTS(base_tokenizer="icu/split", remove_stop_words=False, max_token_length=None))
every = found(table)
print("rows found, defaults:          ", dict(zip(QUERIES, default)))
print("rows found, nothing is dropped:", dict(zip(QUERIES, every)))
if (default, every) != ([1, 0, 0, 0], [1, 1, 1, 1]):
    sys.exit("changed")
print("as described")
PYTHON
