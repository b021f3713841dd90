"""What a user points at, turned into documents: a BEIR folder, JSONL, CSV, or a folder of text and source files.

Files of records (JSONL, CSV) are held to strictly: a broken line is an error that names it, since the user wrote that
file for us. A folder is taken as it is: what cannot be read as text is skipped, and every skip is kept with its reason.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from search_r3.data.beir import read_jsonl, string_field
from search_r3.data.io.delimited import parse_delimiter
from search_r3.data.io.jsonl import id_field
from search_r3.errors import InputError
from search_r3.files import why_missing, wide_encoding
from search_r3.index.csvfile import Misfits, read_csv
from search_r3.index.seen_ids import Ledger

Scalar = str | int | float | bool
Kind = Literal["record", "markdown", "rst", "python", "code", "text"]

MAX_FILE_BYTES = 10_000_000
MAX_QUERIES = 10_000
SKIPPED_FOLDERS = {"node_modules", "__pycache__", "venv", "site-packages"}  # hidden folders are skipped besides
MARKDOWN = {".md", ".markdown", ".mdx"}
TEXT = {".txt", ".text", ".adoc", ".org", ".tex"}
CODE_SUFFIXES = (
    ".c .cc .cfg .clj .cmake .conf .cpp .cs .css .cu .cuh .dart .el .erl .ex .exs .go .gradle .graphql .h .hh .hpp .hs "
    ".ini .java .jl .js .jsx .kt .kts .less .lisp .lua .m .ml .mli .mm .nim .php .pl .pm .proto .ps1 .pyi .pyx .r .rb "
    ".rs .sass .scala .scm .scss .sh .bash .zsh .sql .svelte .swift .tcl .tf .toml .ts .tsx .v .vhd .vim .vue .yaml "
    ".yml .zig"
)
CODE = set(CODE_SUFFIXES.split())
BARE_NAMES = {"readme", "license", "licence", "changelog", "changes", "authors", "contributing", "notice", "news"}
BARE_CODE = {"makefile", "dockerfile", "rakefile", "gemfile", "justfile"}
RECORD_FILES = {".jsonl", ".ndjson", ".csv", ".tsv"}


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """One document as the user has it.

    Attributes:
        path: relative to the source's root.
        line: where in the file the text starts; 0 for a record of JSONL or CSV, whose text is a string on one line.
        record: the line of the file on which such a record stands. For messages only: it is no part of what is
            indexed, as a line that is put in above changes it.
    """

    id: str
    title: str
    text: str
    metadata: dict[str, Scalar] = field(default_factory=dict)
    path: str = ""
    line: int = 1
    kind: Kind = "record"
    record: int = 0

    @property
    def place(self) -> str:
        """Where it stands, for messages: "docs.jsonl line 7", or its id where it came from no file."""
        return f"{self.path} line {self.record or self.line}" if self.path else f'document "{self.id}"'


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something the reader left out: `path` (with the line, for records) and why.

    `unread`: it is there and would be read, or a folder that may hold what would be, but reading failed; so nothing is
    known of what it holds now.
    """

    path: str
    reason: str
    unread: bool = False


class Source:
    """The documents under one path, read anew on each iteration; `skipped` fills up as one goes.

    Of a CSV file, `text_columns` are left as they are, by their names as the index writes them, and `misfits` tell why
    others are text. With `may_be_empty` there need be no document, else `if_empty` follows on what is said then.

    Iterating raises InputError where a record is broken, where an id comes twice, or at the end if there was nothing.
    """

    def __init__(self, path: Path, kind: str, read: Callable[[list[Skipped]], Iterator[SourceDocument]]) -> None:
        self.path = path
        self.kind = kind
        self.skipped: list[Skipped] = []
        self.text_columns: set[str] = set()
        self.misfits: Misfits = {}
        self.may_be_empty = False
        self.if_empty = ""
        self._read = read

    def __iter__(self) -> Iterator[SourceDocument]:
        self.skipped.clear()
        seen = Ledger()
        for document in self._read(self.skipped):
            line = document.record or document.line
            if (first := seen.first(document.id, str(line))) is not None:
                raise InputError(
                    f'{self.path}, line {line}: the id "{document.id}" was already used on line '
                    f"{first}; every document needs an id of its own"
                )
            yield document
        if not seen and not self.may_be_empty:
            nothing = (
                "it holds no text, Markdown, rst or source files" if self.kind == "folder" else "it has no records"
            )
            why = "; ".join(summarise_skipped(self.skipped)) or nothing
            raise InputError(f"{self.path}: nothing to index ({why}){self.if_empty}")


def open_source(path: str | Path, *, max_file_bytes: int = MAX_FILE_BYTES, delimiter: str | None = None) -> Source:
    """Find out what stands at `path` and how to read it: "beir", "jsonl", "csv", "folder" or "file".

    Args:
        path: a folder with `corpus.jsonl` (BEIR); a `.jsonl` file whose objects have `id` (or `_id`), `text` and
            perhaps `title`, everything else being metadata; a `.csv` or `.tsv` file with the same names in its header;
            a folder of text files; or one text file.
        max_file_bytes: larger files of a folder are skipped. Files of records may have any size.
        delimiter: what the file is split at, a character or "comma", "semicolon", "tab" or "pipe"; None finds it out.
            A file of any name is read as a table where it is given.

    Raises:
        InputError: there is no such path, it may not be read, or it is neither a file nor a folder; or a delimiter is
            given for what is no table.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        why = why_missing(path) if path.is_symlink() else (error.strerror or str(error))
        raise InputError(f"{path}: {why}; give a folder, or a .jsonl, .csv or text file") from error
    if stat.S_ISDIR(mode):
        _refuse_delimiter(path, delimiter)
        if not os.access(path, os.R_OK | os.X_OK):
            raise InputError(f"{path}: you may not read this folder; mend its permissions")
        corpus = path / "corpus.jsonl"
        if corpus.is_file():
            return Source(corpus, "beir", lambda skipped: _jsonl(corpus, skipped, beir=True))
        return Source(path, "folder", lambda skipped: _folder(path, skipped, max_file_bytes))
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is neither a file nor a folder; give one of these")
    suffix = path.suffix.lower()
    if suffix in {".jsonl", ".ndjson"}:
        _refuse_delimiter(path, delimiter)
        return Source(path, "jsonl", lambda skipped: _jsonl(path, skipped, beir=False))
    if delimiter is not None or suffix in {".csv", ".tsv"}:
        given = parse_delimiter(delimiter)
        table = Source(path, "csv", lambda skipped: _csv(table, given))
        return table
    return Source(path, "file", lambda skipped: _one_file(path, max_file_bytes))


def _refuse_delimiter(path: Path, delimiter: str | None) -> None:
    if delimiter is not None:
        raise InputError(f"{path}: a delimiter is given ({delimiter!r}), but only a table such as a .csv file has one")


def sample_queries(source: Source, most: int = MAX_QUERIES) -> list[str]:
    """The first `most` queries that stand beside a BEIR corpus; none for other sources, or where they are broken.

    They only serve to measure an index with, so nothing that is wrong with them is worth an error.
    """
    path = source.path.parent / "queries.jsonl"
    if source.kind != "beir" or not path.is_file():
        return []
    try:
        found = (value.get("text") for _, value in itertools.islice(read_jsonl(path), most))
        return [text for text in found if isinstance(text, str) and text.strip()]
    except InputError:
        return []


def summarise_skipped(skipped: list[Skipped], examples: int = 3) -> list[str]:
    """One line a reason, most frequent first: "12 skipped: larger than 10 MB (a.txt, b.txt, c.txt, ...)"."""
    lines = []
    for reason, count in Counter(item.reason for item in skipped).most_common():
        paths = [item.path for item in skipped if item.reason == reason]
        more = ", ..." if count > examples else ""
        lines.append(f"{count:,} skipped: {reason} ({', '.join(paths[:examples])}{more})")
    return lines


# ---------------------------------------------------------------------------------------------------------- records


def _jsonl(path: Path, skipped: list[Skipped], beir: bool) -> Iterator[SourceDocument]:
    for number, value in read_jsonl(path):
        key, identifier = id_field(value, path, number, ("_id", "id") if beir else ("id", "_id"))
        title = string_field(value, "title", path, number, default="")
        text = string_field(value, "text", path, number)
        if not text.strip() and not title.strip():
            if not beir:
                raise InputError(f'{path}, line {number}: the field "text" is empty; fill it or remove this line')
            skipped.append(Skipped(f"{path.name} line {number}", "no text"))
            continue
        rest = {name: item for name, item in value.items() if name not in {key, "title", "text"}}
        yield SourceDocument(identifier, title, text, flat_metadata(rest), path.name, 0, record=number)


def flat_metadata(value: dict[str, Any]) -> dict[str, Scalar]:
    """Metadata as name -> scalar: nulls are left out, an object named "metadata" is opened (BEIR keeps a document's
    fields there), any other list or object becomes its JSON text, so that `tags LIKE '%"rust"%'` still finds it."""
    flat: dict[str, Scalar] = {}
    for name, item in value.items():
        if name == "metadata" and isinstance(item, dict):
            flat.update(flat_metadata(item))
        elif isinstance(item, list | dict):
            flat[name] = json.dumps(item, ensure_ascii=False, sort_keys=True)
        elif item is not None:
            flat[name] = item
    return flat


def _csv(source: Source, delimiter: str | None) -> Iterator[SourceDocument]:
    path = source.path
    if source.may_be_empty and not path.stat().st_size:
        return
    for line, row in read_csv(path, delimiter, source.text_columns, source.misfits):
        identifier, title, text = str(row.pop("id")), str(row.pop("title", "")), str(row.pop("text"))
        if not identifier.strip():
            raise InputError(f'{path}, line {line}: the field "id" is empty; fill it or remove this row')
        if not text.strip() and not title.strip():
            raise InputError(f'{path}, line {line}: the field "text" is empty; fill it or remove this row')
        yield SourceDocument(identifier, title, text, row, path.name, 0, record=line)


# ---------------------------------------------------------------------------------------------------------- folders


def _folder(root: Path, skipped: list[Skipped], max_file_bytes: int) -> Iterator[SourceDocument]:
    for file in _walk(root, skipped):
        name = _printable(file.relative_to(root).as_posix())
        kind = file_kind(file)
        if kind is None:
            skipped.append(Skipped(name, _why_not(file)))
            continue
        text = _read_text(file, max_file_bytes)
        if isinstance(text, Skipped):
            skipped.append(replace(text, path=name))
            continue
        yield SourceDocument(name, name, text, {}, name, 1, kind)


def _walk(root: Path, skipped: list[Skipped]) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        skipped.append(_unread(_relative(Path(error.filename), root), error))

    for folder, folders, files in os.walk(root, onerror=unreadable):
        keep = []
        for name in sorted(folders):
            if _is_passed_over(name):
                continue
            if os.path.islink(os.path.join(folder, name)):
                skipped.append(Skipped(_relative(Path(folder, name), root), "a link to a folder"))
                continue
            keep.append(name)
        folders[:] = keep
        for name in sorted(files):
            file = Path(folder, name)
            if name.startswith("."):
                continue
            if file.is_symlink():
                skipped.append(Skipped(_relative(file, root), _about_link(file, root)))
                continue
            yield file


def _about_link(file: Path, root: Path) -> str:
    """Why a link in a folder is not followed."""
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle, before Python 3.13
        return "a broken link"
    if not target.is_relative_to(root.resolve()):
        return "a link that leads out of the folder"
    *folders, name = target.relative_to(root.resolve()).parts
    if name.startswith(".") or any(_is_passed_over(folder) for folder in folders) or file_kind(target) is None:
        return "a link to a file that is not read"
    return "a link to a file read under its own name"


def would_read(root: Path, place: Path, folder: bool | None = None) -> bool:
    """Whether the folder `root`, read as a source, comes by `place` inside it: a folder, or a file."""
    folder = place.is_dir() if folder is None else folder
    parts = place.relative_to(root).parts
    folders, file = (parts, None) if folder else (parts[:-1], place)
    if not parts or any(_is_passed_over(name) for name in folders):
        return False
    if any((root / Path(*parts[:length])).is_symlink() for length in range(1, len(parts) + 1)):
        return False
    return file is None or (not file.name.startswith(".") and file_kind(file) is not None)


def _is_passed_over(folder: str) -> bool:
    return folder.startswith(".") or folder in SKIPPED_FOLDERS or folder.endswith((".lance", ".egg-info"))


def file_kind(path: Path) -> Kind | None:
    """How a file is to be cut into chunks, by its name; None if it does not look like text."""
    suffix, name = path.suffix.lower(), path.name.lower()
    if suffix in MARKDOWN:
        return "markdown"
    if suffix == ".rst":
        return "rst"
    if suffix in {".py", ".pyi"}:
        return "python"
    if suffix in CODE or name in BARE_CODE:
        return "code"
    if suffix in TEXT or name in BARE_NAMES:
        return "text"
    return None


def _why_not(file: Path) -> str:
    if file.suffix.lower() in RECORD_FILES:
        return "a file of records inside a folder; index it by its own path"
    return f"not a text or source file ({file.suffix.lower()})" if file.suffix else "a file with no extension"


def _one_file(path: Path, max_file_bytes: int) -> Iterator[SourceDocument]:
    text = _read_text(path, max_file_bytes)
    if isinstance(text, Skipped):
        raise InputError(f"{path} cannot be indexed: {text.reason}")
    name = _printable(path.name)
    yield SourceDocument(name, name, text, {}, name, 1, file_kind(path) or "text")


def _read_text(path: Path, max_file_bytes: int) -> str | Skipped:
    name = str(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return Skipped(name, "not a regular file")
        if status.st_size > max_file_bytes:
            return Skipped(name, f"larger than {max_file_bytes / 1e6:g} MB")
        data = path.read_bytes()
    except OSError as error:
        return _unread(name, error)
    if (encoding := wide_encoding(data)) is not None:
        return Skipped(name, f"{encoding} text; save it as UTF-8")
    if b"\0" in data:
        return Skipped(name, "a binary file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Skipped(name, "not UTF-8 text")
    return text if text.strip() else Skipped(name, "empty")


def _unread(name: str, error: OSError) -> Skipped:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Skipped(name, "removed while the folder was read")
    return Skipped(name, f"cannot be read ({error.strerror or error}); what was indexed of it before is kept", True)


def _relative(path: Path, root: Path) -> str:
    return _printable(path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path))


def _printable(name: str) -> str:
    """File names are bytes; those that are not UTF-8 would break every later print and write."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
