#!/bin/sh
# Parquet written by Impala: its text columns are bytes for every reader, and the same comparison finds a row in one, none in another.
#
# Versions: pyarrow 26.0.1, pandas 3.1.1, polars 2.1.0, duckdb 2.0.1; the file is one of fastparquet 0.4.1's test data (25 nations).
# Expected: a column of strings is read as strings, as from a file of pyarrow or of today's Spark.
# Seen: Impala writes a string as BYTE_ARRAY and does not say that it is text (Hive and older Spark do the same), so pyarrow has `binary`,
# DuckDB BLOB, pandas bytes. n_name == "BRAZIL" then finds no row in pandas, without an error, and one row in Polars and DuckDB; DuckDB
# refuses LIKE.
#
# In Search-R3: such columns are text where they are UTF-8 (search_r3/index/readers/record_readers.py, tests/index/readers).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
pip="$work/venv/bin/python -m pip -q --disable-pip-version-check"
$pip install pyarrow==26.0.1 pandas==3.1.1 polars==2.1.0 duckdb==2.0.1
$pip download --no-deps --no-binary fastparquet fastparquet==0.4.1 -d "$work"
tar -xzf "$work/fastparquet-0.4.1.tar.gz" -C "$work" fastparquet-0.4.1/test-data/snappy-nation.impala.parquet
cat > "$work/run.py" <<'PYTHON'
import sys

import duckdb
import pandas
import polars
import pyarrow.parquet

file = sys.argv[1]
rows = pandas.read_parquet(file)
frame = polars.read_parquet(file)
kind, found = duckdb.sql(f"SELECT any_value(typeof(n_name)), count(*) FROM '{file}' WHERE n_name = 'BRAZIL'").fetchall()[0]
try:
    duckdb.sql(f"SELECT count(*) FROM '{file}' WHERE n_comment LIKE '%deposits%'").fetchall()
    like = "finds rows"
except duckdb.BinderException:
    like = "is refused"
print(
    f"pyarrow {pyarrow.parquet.read_schema(file).field('n_name').type}, pandas {type(rows.n_name[0]).__name__}, duckdb {kind};",
    f"n_name == 'BRAZIL': pandas {(rows.n_name == 'BRAZIL').sum()}, polars {frame.filter(polars.col('n_name') == 'BRAZIL').height},",
    f"duckdb {found}; LIKE {like}",
)
PYTHON
found=$("$work/venv/bin/python" "$work/run.py" "$work/fastparquet-0.4.1/test-data/snappy-nation.impala.parquet")
echo "$found"
case "$found" in
"pyarrow binary, pandas bytes, duckdb BLOB; n_name == 'BRAZIL': pandas 0, polars 1, duckdb 1; LIKE is refused") echo "as described" ;;
*)
    echo "changed"
    exit 1
    ;;
esac
