#!/bin/sh
# lancedb 0.40.0 on Python 3.13: what the caller of a query has in its local variables stays in memory until the garbage collector runs.
#
# Expected: when a function that searched a table has returned, its local variables are freed, as reference counting does it.
# Seen: reading a query's result (to_arrow, to_batches) ends by StopAsyncIteration, which passes through a future; the exception's
# traceback and the future's frame form a cycle. On Python 3.13 such a frame holds the frames of all its callers, on 3.11 it does not:
# an object in a caller's local variable is alive after the function has returned, and freed by gc.collect().
#
# In Search-R3: a large document that was posted to a server may stay in memory until the next collection; the test of that
# (tests/server/test_server_request_body.py) collects first on Python 3.12 and later.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.13}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check lancedb==0.40.0 pyarrow==26.0.1
cat > "$work/ask.py" <<'PYTHON'
import gc
import sys
import weakref

import lancedb


class Large:
    pass


def search(table):
    held = Large()
    table.search([1.0, 0.0]).limit(1).to_arrow()
    return weakref.ref(held)


gc.disable()
table = lancedb.connect(sys.argv[1]).create_table("notes", [{"id": "a", "vector": [1.0, 0.0]}])
large = search(table)
states = ["freed" if large() is None else "alive"]
gc.collect()
states.append("freed" if large() is None else "alive")
print(f"Python {sys.version_info[0]}.{sys.version_info[1]}: {states[0]} after the call, {states[1]} after gc.collect()")
PYTHON
found=$("$work/venv/bin/python" "$work/ask.py" "$work/index" 2>/dev/null)
echo "$found"
case "$found" in
"Python 3.13: alive after the call, freed after gc.collect()") echo "as described" ;;
*)
    echo "changed"
    exit 1
    ;;
esac
