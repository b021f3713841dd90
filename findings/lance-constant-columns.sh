#!/bin/sh
# pylance 14.0.2 (and LanceDB 0.40.0, whose new tables have this format): in the file format 2.2, a few rows of a column of equal values
# are slower to read than those of any other column, and the slower the more rows there are.
#
# Expected: a column in which all rows have the same value (no titles, one path, line 1) is the cheapest to read rows of, since nothing
# but the value is stored, and 20 of a million rows cost as much as 20 of ten thousand.
# Seen: 20 of a million rows of such a column take 4 to 5 ms, of text as of integers; the same in format 2.1, and a varied column in 2.2,
# 0.3 to 0.9 ms. With a hundredth of the rows it is fast in 2.2 as well: it looks as if all values of a page were laid out for each read. One
# row with another value makes it fast too, as the page is no longer constant. In 2.3 text is fast, but integers are slow.
#
# In Search-R3: of a million rows without titles the fields of ten took 10 ms, as long as finding them; new tables are written in 2.1
# (`search_r3/index/backends/lance/lance_table.py`, tests/index/backends/lance/test_index_snapshot.py).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check pylance==14.0.2 pyarrow==26.0.1 numpy==2.4.6
cat > "$work/rows.py" <<'PYTHON'
import sys
import time

import lance
import numpy as np
import pyarrow as pa

random = np.random.default_rng(0)


def milliseconds(rows, version):
    """Of reading 20 rows of each column: the least of 30 reads."""
    columns = {
        "equal text": ["corpus.jsonl"] * rows,
        "equal integer": np.ones(rows, dtype=np.int64),
        "nearly equal": ["corpus.jsonl"] * (rows - 1) + ["other"],
        "varied": [f"folder/{number}.md" for number in random.integers(0, 60_000, rows)],
    }
    table = lance.write_dataset(pa.table(columns), f"{sys.argv[1]}/{rows}-{version}.lance", data_storage_version=version)
    found = {}
    for name in columns:
        seconds = []
        for _ in range(30):
            chosen = sorted(random.choice(rows, 20, replace=False).tolist())
            begun = time.perf_counter()
            table.take(chosen, [name])
            seconds.append(time.perf_counter() - begun)
        found[name] = min(seconds) * 1e3
    print(f"{rows:,} rows, {version}:", ", ".join(f"{name} {value:.2f} ms" for name, value in found.items()), file=sys.stderr)
    return found


many, old, few = milliseconds(1_000_000, "2.2"), milliseconds(1_000_000, "2.1"), milliseconds(10_000, "2.2")
slow = [name for name in many if many[name] > 3 * old[name]]
grows = [name for name in many if many[name] > 3 * few[name]]
print("slow in 2.2:", ", ".join(slow), "- grows with the rows:", ", ".join(grows))
PYTHON
found=$("$work/venv/bin/python" "$work/rows.py" "$work")
echo "$found"
case "$found" in
"slow in 2.2: equal text, equal integer - grows with the rows: equal text, equal integer") echo "as described" ;;
*)
    echo "changed"
    exit 1
    ;;
esac
