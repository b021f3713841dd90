"""A package's texts as documents: sections of its README and documentation, and its modules, classes and functions.

The text that a question is made from (the heading, the docstring's first paragraph) is removed from the document.
Python code is parsed, never imported.
"""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from search_r3.data.fresh.fresh_config import FreshConfig
from search_r3.data.fresh.release import Release, normalized_name
from search_r3.data.sources.docstrings import SKIPPED_DECORATORS, SKIPPED_FILES, SKIPPED_FOLDERS, SKIPPED_NAMES
from search_r3.data.sources.records import clip

MIN_PROSE = 10
"""Minimum number of words in a section outside its code."""
MAX_FIRST_PARAGRAPH = 60
"""In words; of a longer first paragraph only the first sentence is removed."""
DOCUMENTS = (".md", ".markdown", ".rst")
_NOT_DOCUMENTS = re.compile(
    r"change(s|log)|history|news$|release|licen[cs]e|copying|notice|contribut|code.of.conduct|security|authors?$|"
    r"credits|todo|third.?party|agents$|claude$|skill",
    re.IGNORECASE,
)
_HIDDEN = re.compile(r"\.|.*\.(dist-info|egg-info)$|(node_modules|licenses|build|dist)$")


@dataclass(frozen=True, slots=True)
class Passage:
    """One document, and the text that a question may be made from.

    Attributes:
        id: unique, without white space: PACKAGE:FILE#NUMBER for a section, PACKAGE:MODULE.NAME for code.
        package: the distribution's name.
        kind: one of `fresh_config.KINDS`.
        title: the package and the headings above, or the module.
        text: the document, without `asked`.
        asked: the heading, or the docstring whose first sentence becomes the question; None if there is none.
    """

    id: str
    package: str
    kind: str
    title: str
    text: str
    asked: str | None


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, the headings above it, and the text up to the next heading of any level."""

    above: tuple[str, ...]
    heading: str
    body: str


def read_passages(
    release: Release, config: FreshConfig, dropped: Counter[str], skip: tuple[str, ...] = ()
) -> list[Passage]:
    """The documents of a package, in the order of its files, without those below a path in `skip`.

    `dropped` counts the other texts by reason.
    """
    texts, codes = _readable(release, dropped, skip)
    found: list[Passage] = []
    if "section" in config.kinds:
        for name, text, markdown in texts:
            found += _sections(release, name, text, markdown, config, dropped)
    for name, text in codes:
        found += _code(release, name, text, config, dropped)
    unique: dict[str, Passage] = {}
    for passage in found:
        unique.setdefault(passage.id, passage)  # if a name is defined twice, the first definition is used
    return list(unique.values())


def _readable(
    release: Release, dropped: Counter[str], skip: tuple[str, ...]
) -> tuple[list[tuple[str, str, bool]], list[tuple[str, str]]]:
    """The package's documents as (name, text, whether it is Markdown) and its modules as (name, text)."""
    texts: list[tuple[str, str, bool]] = []
    if release.description:
        texts.append(("README", release.description, release.markdown))
    root = _common_root(release)
    codes: list[tuple[str, str]] = []
    for name, raw in release.contents.files.items():
        inside = PurePosixPath(name).relative_to(root)
        parts, stem, ending = inside.parts[:-1], inside.stem, inside.suffix.lower()
        if any(_HIDDEN.match(part) or SKIPPED_FOLDERS.match(part) for part in parts):
            continue
        if any(inside.is_relative_to(one) for one in skip):
            dropped["file left out by the recipe"] += 1
            continue
        is_document, is_code = ending in DOCUMENTS, inside.suffix == ".py"
        if (is_document and _NOT_DOCUMENTS.match(stem)) or (is_code and SKIPPED_FILES.match(stem)):
            continue
        text = _decoded(raw, dropped)
        if text is not None and is_document:
            texts.append((inside.as_posix(), text, ending != ".rst"))
        elif text is not None and is_code:
            codes.append((inside.as_posix(), text))
    return texts, codes


def _decoded(raw: bytes, dropped: Counter[str]) -> str | None:
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        dropped["file that is not UTF-8"] += 1
        return None
    if "\0" in text:
        dropped["file with a NUL character"] += 1
        return None
    return text


def _common_root(release: Release) -> PurePosixPath:
    """The single top folder of a source archive, NAME-VERSION; empty for anything else."""
    tops = {PurePosixPath(name).parts[0] for name in release.contents.files}
    return PurePosixPath(tops.pop()) if release.kind == "sdist" and len(tops) == 1 else PurePosixPath()


# ------------------------------------------------------------------------------------------------------------ sections


def _sections(
    release: Release, name: str, text: str, markdown: bool, config: FreshConfig, dropped: Counter[str]
) -> Iterator[Passage]:
    sections = markdown_sections(text) if markdown else rest_sections(text)
    for number, section in enumerate(sections, start=1):
        body, prose = _cleaned(section.body, markdown)
        if len(body.split()) < config.min_words or len(prose.split()) < MIN_PROSE:
            dropped["short section"] += 1
            continue
        above = [one for one in section.above if normalized_name(one) != normalized_name(release.name)]
        title = " - ".join([release.name, *(plain_heading(one) for one in above if one != section.heading)])
        where = re.sub(r"\s+", "_", name)
        key = f"{normalized_name(release.name)}:{where}#{number}"
        yield Passage(key, release.name, "section", title, clip(body, config.max_chars), section.heading or None)


def markdown_sections(text: str) -> list[Section]:
    """The sections of CommonMark text, by ATX (#) and underlined headings outside fenced code."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # front matter
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    headings: list[tuple[int, int, int, str]] = []
    lines = text.split("\n")
    fence = ""
    for number, line in enumerate(lines):
        mark = re.match(r"\s{0,3}(`{3,}|~{3,})", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        elif fence:
            continue
        elif found := re.match(r" {0,3}(#{1,6})[ \t]+(.*?)[ \t]*#*[ \t]*$", line):
            headings.append((number, number + 1, len(found[1]), found[2]))
        elif number and re.fullmatch(r" {0,3}(=+|-{2,})[ \t]*", line) and _may_be_title(lines, number - 1):
            headings.append((number - 1, number + 1, 1 if "=" in line else 2, lines[number - 1].strip()))
    return _cut(lines, headings)


def _may_be_title(lines: list[str], number: int) -> bool:
    line = lines[number]
    before = lines[number - 1].strip() if number else ""
    return bool(line.strip()) and not before and not re.match(r"\s{4}|\s*([-*+>|#]|\d+\.)\s?", line)


def rest_sections(text: str) -> list[Section]:
    """The sections of reStructuredText; a heading's level follows from the order in which the adornments first
    occur."""
    lines = text.split("\n")
    ways: list[tuple[str, bool]] = []
    headings: list[tuple[int, int, int, str]] = []
    for number, line in enumerate(lines[1:], start=1):
        title = lines[number - 1]
        rule = re.fullmatch(r"([=\-`:.'\"~^_*+#<>])\1{2,}\s*", line)
        over = number > 1 and lines[number - 2].rstrip() == line.rstrip()
        if not rule or not title.strip() or (title[:1].isspace() and not over):
            continue
        if len(line.rstrip()) < len(title.strip()) or re.fullmatch(r"(\W)\1*", title.strip()):
            continue
        way = (rule[1], over)
        if way not in ways:
            ways.append(way)
        headings.append((number - 1 - over, number + 1, 1 + ways.index(way), title.strip()))
    return _cut(lines, headings)


def _cut(lines: list[str], headings: list[tuple[int, int, int, str]]) -> list[Section]:
    """Sections from headings given as (first line, line after, level, text)."""
    first = headings[0][0] if headings else len(lines)
    sections = [Section((), "", "\n".join(lines[:first]))]
    above: list[tuple[int, str]] = []
    ends = [one[0] for one in headings[1:]] + [len(lines)]
    for (_, start, level, heading), end in zip(headings, ends, strict=True):
        above = [one for one in above if one[0] < level]
        sections.append(Section(tuple(text for _, text in above), heading, "\n".join(lines[start:end])))
        above.append((level, heading))
    return sections


def plain_heading(heading: str) -> str:
    """A heading without numbering, markup, links, images and emoji."""
    text = re.sub(r"!\[[^\]]*\](\([^)]*\))?|\{#[^}]*\}|</?\w[^>]*>", "", heading)
    text = re.sub(r"\[([^\]]+)\](\([^)]*\)|\[[^\]]*\])", r"\1", text)
    text = re.sub(r"(:\w+)+:(?=`)|[`*]|(?<!\w)_+|_+(?!\w)", "", text)
    text = re.sub(r"[\U0001F000-\U0001FFFF\u2600-\u27BF\uFE0F\u2B00-\u2BFF]", "", text)
    text = (
        re.sub(
            r"^\s*((step|part|chapter|section|phase)\s+)?(\d+(\.\d+)*|[A-Z])[.):]?\s*[-–—:.)]?\s+", "", text, flags=re.I
        )
        if re.match(r"\s*((step|part|chapter|section|phase)\s+\w|\d+(\.\d+)*[.):\s])", text, re.I)
        else text
    )
    return re.sub(r"\s+", " ", text).strip(" :.-–—")


def _cleaned(body: str, markdown: bool) -> tuple[str, str]:
    """(the text as a document, its prose alone)."""
    if markdown:
        body = re.sub(r"\[?!\[[^\]]*\]\([^)]*\)(\]\([^)]*\))?", "", body)  # images and badges
        body = re.sub(r"\[([^\]]+)\]\([^)\s]*(\s\"[^\"]*\")?\)", r"\1", body)
        body = re.sub(r"^\s*\[[^\]]+\]:\s*\S+.*$", "", body, flags=re.MULTILINE)
        body = re.sub(
            r"</?(a|p|div|img|br|span|details|summary|h\d|b|i|em|strong|sub|sup|picture|source)\b[^>]*>", "", body
        )
        prose = re.sub(r"^\s{0,3}(`{3,}|~{3,}).*?^\s{0,3}\1", "", body, flags=re.MULTILINE | re.DOTALL)
    else:
        body = re.sub(r"^\s*\.\. (_[^:]+:|image::|figure::|\|[^|]+\|).*$", "", body, flags=re.MULTILINE)
        body = re.sub(r"(:\w+)+:`~?([^`<]*?)\s*(<[^`>]*>)?`", r"\2", body)
        prose = re.sub(r"(::|\.\. code.*)\n(\s*\n|[ \t]+\S.*\n?)+", "\n", body)
    prose = re.sub(r"`[^`]*`|\W*\|\W*", " ", prose)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", body, flags=re.MULTILINE)).strip(), prose


# ---------------------------------------------------------------------------------------------------------------- code


def _code(release: Release, name: str, text: str, config: FreshConfig, dropped: Counter[str]) -> Iterator[Passage]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        dropped["file that does not parse"] += 1
        return
    lines = text.split("\n")
    parts = [part for part in PurePosixPath(name).with_suffix("").parts if part not in ("__init__", "src")]
    module = re.sub(r"\s+", "_", ".".join(parts)) or release.name
    waiting: list[tuple[ast.AST, str]] = [(tree, module)]
    while waiting:
        node, where = waiting.pop(0)
        passage = _passage(node, where, module, lines, release, config, dropped)
        if passage:
            yield passage
        if isinstance(node, ast.Module | ast.ClassDef | ast.If | ast.Try):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    waiting.append((child, f"{where}.{child.name}"))
                elif isinstance(child, ast.If | ast.Try):
                    waiting.append((child, where))


def _passage(
    node: ast.AST,
    where: str,
    module: str,
    lines: list[str],
    release: Release,
    config: FreshConfig,
    dropped: Counter[str],
) -> Passage | None:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    kind = {ast.Module: "module", ast.ClassDef: "class"}.get(type(node), "function")
    if kind not in config.kinds or (kind != "module" and SKIPPED_NAMES.match(where.rpartition(".")[2])):
        return None
    docstring = ast.get_docstring(node, clean=False)
    if not docstring:
        dropped[f"{kind} without a docstring"] += 1
        return None
    if kind == "function" and any(_named(one) in SKIPPED_DECORATORS for one in node.decorator_list):  # type: ignore[union-attr]
        return None
    rest = without_first_paragraph(docstring)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        first = node.body[0]
        if first.lineno == node.lineno or first.end_lineno is None:
            return None  # a one-line function
        start = min([node.lineno, *(one.lineno for one in node.decorator_list)]) - 1
        head, body = lines[start : first.lineno - 1], lines[first.end_lineno : node.end_lineno]
        text = "\n".join(part for part in (_dedent(head), _indented(rest), _dedent(head[:1], body)) if part.strip())
    else:
        text = "\n".join(part for part in (_heading_of(node), _indented(rest) if kind == "class" else rest) if part)
        text = "\n".join([text, *_members(node)])
    if len(re.findall(r"\w+", text)) < config.min_words:
        dropped[f"short {kind}"] += 1
        return None
    key = f"{normalized_name(release.name)}:{where}" + (":module" if kind == "module" else "")
    title = f"{release.name} {module}"
    whole = kind == "module" and "." not in where  # it repeats the README, so no question fits it alone
    return Passage(key, release.name, kind, title, clip(text, config.max_chars), None if whole else docstring)


def without_first_paragraph(docstring: str) -> str:
    """A docstring without the paragraph that the question is made from; of a long paragraph only the first sentence is
    removed."""
    clean = inspect.cleandoc(docstring)
    first, _, rest = clean.partition("\n\n")
    if len(first.split()) > MAX_FIRST_PARAGRAPH and (end := re.search(r"[.!?]\s", first)):
        return f"{first[end.end() :].strip()}\n\n{rest}".strip()
    return rest.strip()


def _heading_of(node: ast.Module | ast.ClassDef) -> str:
    if isinstance(node, ast.Module):
        return ""
    bases = [base for base in map(_named, node.bases) if base]
    return f"class {node.name}({', '.join(bases)}):" if bases else f"class {node.name}:"


def _members(node: ast.Module | ast.ClassDef) -> list[str]:
    """One line for each public function, class and annotated field, which give a search something to match."""
    found = []
    indent = "    " if isinstance(node, ast.ClassDef) else ""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            names = [one.arg for one in child.args.args + child.args.kwonlyargs if one.arg not in ("self", "cls")]
            found.append(f"{indent}def {child.name}({', '.join(names)})")
        elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            found.append(f"{indent}class {child.name}")
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            found.append(f"{indent}{child.target.id}")
    return found


def _named(node: ast.AST) -> str:
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _dedent(head: list[str], body: list[str] | None = None) -> str:
    """Lines without the indent of the first line of `head` (textwrap.dedent fails if a string literal is indented
    less)."""
    indent = head[0][: len(head[0]) - len(head[0].lstrip())] if head else ""
    return "\n".join(line.removeprefix(indent).rstrip() for line in (head if body is None else body)).strip("\n")


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
