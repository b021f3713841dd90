"""Readers of text files, one document per file: plain text, Markdown, reStructuredText, Python, other source code.

The front matter of Markdown (YAML between two lines of "---" at the top) becomes metadata.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from search_r3.index.readers.csv_file import plain_name
from search_r3.index.readers.document_reader import DocumentReader, SourceFile
from search_r3.index.readers.record_readers import flat_metadata
from search_r3.index.source_document import Kind, Scalar, SourceDocument

CODE_SUFFIXES = (
    ".c .cc .cfg .clj .cmake .conf .cpp .cs .css .cu .cuh .dart .el .erl .ex .exs .go .gradle .graphql .h .hh .hpp .hs "
    ".ini .java .jl .js .jsx .kt .kts .less .lisp .lua .m .ml .mli .mm .nim .php .pl .pm .proto .ps1 .pyx .r .rb "
    ".rs .sass .scala .scm .scss .sh .bash .zsh .sql .svelte .swift .tcl .tf .toml .ts .tsx .v .vhd .vim .vue .yaml "
    ".yml .zig"
)

MAX_FRONT_MATTER = 100
"""Lines in which a front matter ends."""


class TextFileReader(DocumentReader):
    """Reads a text file as one document, titled with its name; `cut_as` says how it is cut into chunks."""

    cut_as: ClassVar[Kind]

    def read(self, file: SourceFile) -> Iterator[SourceDocument]:
        yield file.document(file.text(), kind=self.cut_as)


class PlainTextReader(TextFileReader):
    """Plain text, cut at blank lines."""

    suffixes = (".txt", ".text", ".adoc", ".org", ".tex")
    names = ("readme", "license", "licence", "changelog", "changes", "authors", "contributing", "notice", "news")
    cut_as = "text"


class MarkdownReader(DocumentReader):
    """Markdown, cut at its headings, without its front matter, whose title is the document's."""

    suffixes = (".md", ".markdown", ".mdx")

    def read(self, file: SourceFile) -> Iterator[SourceDocument]:
        text = file.text()
        fields, lines = front_matter(text)
        body = text.split("\n", lines)[-1] if lines else text
        if not body.strip():
            fields, lines, body = {}, 0, text
        title = str(fields.pop("title", ""))
        yield file.document(body, kind="markdown", title=title, metadata=fields, line=lines + 1)


def front_matter(text: str) -> tuple[dict[str, Scalar], int]:
    """The fields of a Markdown text's front matter, and its number of lines; ({}, 0) without one that is valid.

    Values are text as it is written, since one file may have a number where another has a word; `--type year=integer`
    makes a column of numbers. Lists become JSON.
    """
    lines = text.split("\n", MAX_FRONT_MATTER)[:MAX_FRONT_MATTER]
    end = next((i for i, line in enumerate(lines) if i and line.rstrip() in {"---", "..."}), 0)
    if lines[0].rstrip() != "---" or not end:
        return {}, 0
    import yaml

    from search_r3.yaml_file import parse_yaml

    block = "\n".join(lines[1:end])
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(block, Loader=yaml.BaseLoader)):
            return {}, 0  # a few aliases can stand for more text than memory holds
        fields = parse_yaml(block, yaml.BaseLoader)  # strings, lists and mappings only
    except (yaml.YAMLError, RecursionError):
        return {}, 0
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        return {}, 0
    kept: dict[str, Scalar] = {}
    columns: set[str] = set()
    for name, value in flat_metadata(fields).items():
        if value != "" and plain_name(name) not in columns:
            columns.add(plain_name(name))
            kept[name.lower() if name.lower() == "title" else name] = value
    return kept, end + 1


class RstReader(TextFileReader):
    """reStructuredText, cut at its headings."""

    suffixes = (".rst",)
    cut_as = "rst"


class PythonReader(TextFileReader):
    """Python, cut at its classes and functions."""

    suffixes = (".py", ".pyi")
    cut_as = "python"


class CodeReader(TextFileReader):
    """Source code of other languages and configuration files, cut at blank lines."""

    suffixes = tuple(CODE_SUFFIXES.split())
    names = ("makefile", "dockerfile", "rakefile", "gemfile", "justfile")
    cut_as = "code"


PLAIN_TEXT = PlainTextReader()
"""Also reads files of any other name that are indexed by their own path."""
READERS: tuple[DocumentReader, ...] = (MarkdownReader(), RstReader(), PythonReader(), CodeReader(), PLAIN_TEXT)
