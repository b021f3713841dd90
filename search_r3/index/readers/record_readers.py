"""Readers of files of records: JSONL, CSV, Parquet, and the corpus of a BEIR folder.

They are strict: a malformed line is an error that names it, since the user wrote the file for this purpose.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from search_r3.data.io.jsonl import id_field, read_jsonl, string_field
from search_r3.errors import InputError
from search_r3.index.readers.csv_file import read_csv
from search_r3.index.readers.document_reader import DocumentReader, SourceFile
from search_r3.index.source_document import Scalar, Skipped, SourceDocument


class JsonLinesReader(DocumentReader):
    """One object per line with an id, `text`, and perhaps `title`; everything else is metadata."""

    def read(self, file: SourceFile) -> Iterator[SourceDocument]:
        for number, value in read_jsonl(file.path):
            ids = (file.fields["id"],) if "id" in file.fields else self._id_fields()
            key, identifier = id_field(value, file.path, number, ids)
            title = string_field(value, file.fields.get("title", "title"), file.path, number, default="")
            text = string_field(value, file.fields.get("text", "text"), file.path, number)
            if not text.strip() and not title.strip():
                self._without_text(file, number)
                continue
            rest = {name: item for name, item in value.items() if name not in _of_document(file, key)}
            yield SourceDocument(identifier, title, text, flat_metadata(rest), file.name, 0, record=number)

    def _id_fields(self) -> tuple[str, str]:
        """The fields that may have the id, in order of precedence."""
        return ("id", "_id")

    def _without_text(self, file: SourceFile, number: int) -> None:
        name = file.fields.get("text", "text")
        raise InputError(f'{file.path}, line {number}: the field "{name}" is empty; fill it or remove this line')


class JsonlReader(JsonLinesReader):
    """The user's own JSONL files."""

    suffixes = (".jsonl", ".ndjson")
    kind = "jsonl"


class BeirReader(JsonLinesReader):
    """The corpus of a BEIR folder (corpus.jsonl). Documents without text are skipped: public corpora have some."""

    kind = "beir"
    folder_file = "corpus.jsonl"

    def _id_fields(self) -> tuple[str, str]:
        return ("_id", "id")

    def _without_text(self, file: SourceFile, number: int) -> None:
        file.skipped.append(Skipped(f"{file.name} line {number}", "no text"))


class CsvReader(DocumentReader):
    """A table with a header that names `id`, `text`, and perhaps `title`; every other column is metadata, typed."""

    suffixes = (".csv", ".tsv")
    kind = "csv"

    def read(self, file: SourceFile) -> Iterator[SourceDocument]:
        path = file.path
        if file.may_be_empty and not path.stat().st_size:
            return
        for line, row in read_csv(path, file.delimiter, file.text_columns, file.misfits, file.fields):
            identifier, title, text = str(row.pop("id")), str(row.pop("title", "")), str(row.pop("text"))
            if not identifier.strip():
                raise InputError(f'{path}, line {line}: the field "id" is empty; fill it or remove this row')
            if not text.strip() and not title.strip():
                raise InputError(f'{path}, line {line}: the field "text" is empty; fill it or remove this row')
            yield SourceDocument(identifier, title, text, row, file.name, 0, record=line)


class ParquetReader(DocumentReader):
    """A Parquet file with the columns of a JSONL file, read by pyarrow, a batch of rows at a time.

    Impala, Hive and older Spark write strings as bytes that nothing marks as text: bytes in UTF-8 are text.
    """

    suffixes = (".parquet",)
    kind = "parquet"

    def read(self, file: SourceFile) -> Iterator[SourceDocument]:
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            with pyarrow.parquet.ParquetFile(file.path) as table:
                _check_columns(file, table.schema_arrow.names)
                for batch in table.iter_batches(PARQUET_ROWS):
                    for value in batch.to_pylist():
                        number += 1
                        yield _parquet_row(file, number, {name: _plain(item) for name, item in value.items()})
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{file.path}: not a Parquet file that can be read ({error}); write it again") from error

    def lines(self, path: Path) -> int:
        import pyarrow
        import pyarrow.parquet

        try:
            return int(pyarrow.parquet.read_metadata(path).num_rows)
        except pyarrow.ArrowException as error:
            raise OSError(f"{path}: not a Parquet file") from error


def _check_columns(file: SourceFile, names: list[str]) -> None:
    missing = [given for given in file.fields.values() if given not in names]
    missing += [] if "id" in file.fields or {"id", "_id"} & set(names) else ["id"]
    missing += [] if {"text", "title"} & {*names, *file.fields} else ["text"]
    if missing:
        raise InputError(
            f'{file.path}: no column "{missing[0]}" (columns found: {", ".join(names)[:500]}); name those to use: '
            "--field id=COLUMN --field text=COLUMN"
        )


def _parquet_row(file: SourceFile, number: int, value: dict[str, Any]) -> SourceDocument:
    place = f"{file.path}, row {number}"
    ids = (file.fields["id"],) if "id" in file.fields else ("id", "_id")
    key = next((name for name in ids if name in value), None)
    identifier = value.get(key) if key else None
    if type(identifier) not in (str, int) or not str(identifier).strip():
        raise InputError(
            f'{place}: the column "{key or ids[0]}" has {identifier!r}; it must be a string or a whole number'
        )
    title, text = (value.get(file.fields.get(name, name)) or "" for name in ("title", "text"))
    if not (isinstance(title, str) and isinstance(text, str) and (title.strip() or text.strip())):
        name = file.fields.get("text", "text")
        raise InputError(f'{place}: the column "{name}" is missing, empty or not text; fill it or remove this row')
    rest = {name: item for name, item in value.items() if name not in _of_document(file, key)}
    return SourceDocument(str(identifier), title, text, flat_metadata(rest), file.name, 0, record=number)


def _of_document(file: SourceFile, key: str | None) -> set[str | None]:
    """The fields that are no metadata: those of the document, `key` with its id, and those that these replace."""
    return {key, "title", "text", *file.fields, *file.fields.values()}


def _plain(value: Any) -> Any:
    """A value of Arrow as JSON has it: dates in ISO 8601, decimals as text, bytes as text too, in hexadecimal if they
    are not UTF-8."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.hex()
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def flat_metadata(value: dict[str, Any]) -> dict[str, Scalar]:
    """Metadata as name -> scalar. Nulls are left out, the fields of an object named "metadata" are included (BEIR keeps
    a document's fields there), and any other list or object becomes JSON text, so that `tags LIKE '%"rust"%'` works."""
    flat: dict[str, Scalar] = {}
    for name, item in value.items():
        if name == "metadata" and isinstance(item, dict):
            flat.update(flat_metadata(item))
        elif isinstance(item, list | dict):
            flat[name] = json.dumps(item, ensure_ascii=False, sort_keys=True)
        elif item is not None:
            flat[name] = item
    return flat


PARQUET_ROWS = 256
"""Rows of a Parquet file that are in memory at a time."""
TABLE = CsvReader()
"""Also reads files of any name for which a delimiter is given."""
READERS = (JsonlReader(), TABLE, ParquetReader(), BeirReader())
