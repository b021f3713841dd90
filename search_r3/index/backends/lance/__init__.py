"""The index in a LanceDB table: columns, rows, approximate and full-text index, compaction."""
