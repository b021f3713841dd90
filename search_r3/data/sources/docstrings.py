"""Docstring -> function pairs from Python source trees, in the manner of CodeSearchNet but from installed packages.

Files are only parsed (`ast`), never imported or run. After CodeSearchNet (Husain et al. 2019,
https://arxiv.org/abs/1909.09436): the query is the docstring's first sentence, the document is the function.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import random
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from search_r3.data.io.line_reader import MAX_LINE, BrokenFile, TooLong, is_html_page, read_whole
from search_r3.data.pairs import TrainingPair
from search_r3.data.sources.querystyle import MAX_WORDS, as_name_query, as_web_query, first_sentence
from search_r3.data.sources.records import Records
from search_r3.errors import InputError

STDLIB = "stdlib"
MAX_SOURCE = MAX_LINE  # maximum size of a file in bytes; handwritten code is shorter
DECLARED = re.compile(rb"[ \t\f]*#.*?coding[:=][ \t]*(?!utf-?8)[-\w.]+", re.IGNORECASE)  # PEP 263
MAX_DOCSTRING_CHARS = 320  # of a kept docstring, so that the first hundred tokens still contain code
GENERIC_AFTER = 3  # a sentence shared by more functions is too generic
SKIPPED_FOLDERS = re.compile(
    r"tests?$|testing$|test-examples$|site-packages$|__pycache__$|_?vendor(ed)?$|externals$|third_party$|idlelib$|"
    r"lib2to3$|turtledemo$|benchmarks$|ensurepip$|lib-dynload$"
)
SKIPPED_FILES = re.compile(r"test_|testing_utils$|conftest$|.*_test$")
SKIPPED_NAMES = re.compile(r"^(test_|_?test$|__\w+__$|setUp|tearDown|visit_|do_test|_print_|_eval_)")
SKIPPED_DECORATORS = frozenset({"overload", "abstractmethod", "deprecated", "setter", "deleter"})


@dataclass(frozen=True, slots=True)
class Function:
    """A documented function's source: `code` without its docstring, `documented` with a shortened one."""

    id: str
    name: str
    arguments: tuple[str, ...]
    docstring: str
    code: str
    documented: str
    body_lines: int


def find_package(name: str) -> Path:
    """The folder of an installed package's source, or of the standard library for "stdlib", without importing it.

    Raises:
        InputError: it is not installed, or it is not a package of Python files.
    """
    if name == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    if not name.isidentifier():
        raise InputError(f'"{name}" is not the name of a top-level package; give one such as numpy, or "{STDLIB}"')
    spec = importlib.util.find_spec(name)
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise InputError(f'the package "{name}" is not installed; install it or mark the source "optional: true"')
    return Path(folders[0])


def source_files(folder: Path) -> list[Path]:
    """The Python files below a package's folder without tests and vendored packages, sorted."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if not any(map(SKIPPED_FOLDERS.match, parts)) and not SKIPPED_FILES.match(parts[-1]) and path.is_file():
            found.append(path)
    return found


def read_functions(folder: Path, label: str, records: Records | None = None) -> Iterator[Function]:
    """Every documented function and method below `folder`, in the order of the files' paths. Nested functions are part
    of the outer one.

    Args:
        folder: a package's folder.
        label: the package's name, which ids begin with.
        records: checks the files; also counts intact files that do not parse or that declare another encoding.

    Raises:
        InputError: a file is damaged and `damaged` is "refuse".
    """
    records = records or Records("skip")
    records.folder = folder
    for path in source_files(folder):
        name = path.relative_to(folder)
        parts = name.with_suffix("").parts
        source = _source_of(path, f"{label}/{name.as_posix()}", records)
        if source is None:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            records.dropped["file that does not parse"] += 1
            continue
        module = ".".join([label, *(part for part in parts if part != "__init__")])
        yield from functions_of(tree, source, module)


def _source_of(path: Path, where: str, records: Records) -> str | None:
    """A Python file's text with \
 line ends; None if it is damaged or declares another encoding."""
    try:
        raw = read_whole(path, MAX_SOURCE)
    except BrokenFile as error:
        records.fault(where, "broken file", f"it cannot be read ({error.problem})")
        return None
    if isinstance(raw, TooLong):
        records.fault(where, "file over 10 MB", f"{raw.size:,} bytes, expected Python source")
    elif b"\0" in raw:
        records.fault(where, "binary", "binary data (a NUL byte), expected Python source")
    elif is_html_page(raw):
        records.fault(where, "HTML", "an HTML page, expected Python source")
    else:
        try:
            return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            if any(map(DECLARED.match, raw.split(b"\n", 2)[:2])):
                records.dropped["file in another encoding"] += 1
            else:
                problem = f"not UTF-8 text (byte 0x{raw[error.start]:02x} at {error.start + 1})"
                records.fault(where, "not UTF-8", problem)
    return None


def functions_of(tree: ast.AST, source: str, module: str) -> Iterator[Function]:
    """The documented functions of one parsed file; if a name is defined twice, the first is used."""
    lines = source.splitlines()
    seen: set[str] = set()
    waiting: list[tuple[ast.AST, str]] = [(tree, module)]
    while waiting:
        node, prefix = waiting.pop(0)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                function = _function(child, f"{prefix}.{child.name}", lines)
                if function and function.id not in seen:
                    seen.add(function.id)
                    yield function
            elif isinstance(child, ast.ClassDef):
                waiting.append((child, f"{prefix}.{child.name}"))
            elif isinstance(child, ast.If | ast.Try):
                waiting.append((child, prefix))


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str, lines: list[str]) -> Function | None:
    docstring = ast.get_docstring(node, clean=False)
    first = node.body[0]
    if not docstring or len(node.body) < 2 or first.end_lineno is None or node.end_lineno is None:
        return None
    if any(_last_name(decorator) in SKIPPED_DECORATORS for decorator in node.decorator_list):
        return None
    start, doc_start, doc_end = node.lineno - 1, first.lineno - 1, first.end_lineno
    if lines[doc_start].strip()[:1] not in "\"'rRuU" or node.body[1].lineno <= doc_end:
        return None  # other code on the docstring's line
    head, body = lines[start:doc_start], lines[doc_end : node.end_lineno]
    while body and not body[0].strip():
        body = body[1:]
    short = _short_docstring(lines[doc_start:doc_end])
    return Function(
        id=name,
        name=node.name,
        arguments=tuple(a.arg for a in node.args.args if a.arg not in ("self", "cls")),
        docstring=docstring,
        code=_dedent([*head, *body]),
        documented=_dedent([*head, *short, *body]),
        body_lines=sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in body),
    )


def _short_docstring(lines: list[str]) -> list[str]:
    """The docstring's source cut after the last paragraph that fits, with its closing quotes put back."""
    if sum(map(len, lines)) <= MAX_DOCSTRING_CHARS or len(lines) < 3:
        return lines
    size, end = 0, 0
    for number, line in enumerate(lines[:-1]):
        size += len(line.strip())
        if size > MAX_DOCSTRING_CHARS and end:
            break
        if not lines[number + 1].strip() and number:
            end = number + 1
        elif not lines[number + 1].strip():
            end = 1
    quotes = '"""' if '"""' in lines[0] else "'''"
    if not end or quotes not in lines[0]:
        return lines
    kept = lines[:end]
    # An underlined heading such as "Parameters" is useless without its content.
    while len(kept) > 1 and (not kept[-1].strip() or re.match(r"\s*([-=]{3,}|\w+:?)\s*$", kept[-1])):
        kept.pop()
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return [*kept, indent + quotes]


def _dedent(lines: list[str]) -> str:
    """Dedent by the first line's indent (textwrap.dedent fails if a string literal is indented less)."""
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return "\n".join(line.removeprefix(indent).rstrip() for line in lines).strip()


def _last_name(node: ast.expr) -> str:
    while isinstance(node, ast.Call):
        node = node.func
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _cut(text: str, max_chars: int) -> str:
    """At most `max_chars` characters, ending with a whole line where there is one."""
    if len(text) <= max_chars:
        return text
    return text[:max_chars].rsplit("\n", 1)[0].rstrip()


def fingerprint(code: str) -> str:
    """A hash of a function that ignores docstring, comments, white space and case, to detect copies."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        bare = re.sub(r'("""|\'\'\').*?\1', "", code, flags=re.DOTALL)
        bare = re.sub(r"\W+", "", bare)
    else:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node, clean=False):
                node.body = node.body[1:] or [ast.Pass()]
        bare = re.sub(r"\W+", "", ast.unparse(tree))
    return hashlib.blake2b(bare.lower().encode(), digest_size=16).hexdigest()


def docstring_pairs(
    packages: Sequence[str],
    *,
    seed: int = 0,
    documented_share: float = 0.5,
    web_share: float = 0.6,
    name_share: float = 0.1,
    min_body_lines: int = 3,
    max_chars: int = 1200,
    excluded: Iterable[str] = (),
    records: Records | None = None,
) -> tuple[list[TrainingPair], Counter[str]]:
    """Docstring -> function pairs of installed packages.

    Args:
        packages: names of top-level packages; "stdlib" is the standard library.
        seed: determines, with the function's id, all random choices.
        documented_share: share of positives that keep their docstring (shortened to a few lines).
        web_share: share of queries rewritten in the style of web search queries.
        name_share: share of queries made from the function's name; the rest are unchanged sentences.
        min_body_lines: minimum lines of code below the signature, not counting docstring, comments and blank lines.
        max_chars: a positive is cut at a line end before this many characters.
        excluded: texts of functions that must not appear (an evaluation corpus); compared without docstrings.
        records: checks the files and counts what is dropped; by default damaged files are skipped.

    Returns:
        The pairs, and the number of functions dropped by reason.

    Raises:
        InputError: a package is not installed, or a file is damaged and `damaged` is "refuse".
    """
    records = records or Records("skip")
    dropped = records.dropped
    forbidden = {fingerprint(code) for code in excluded}
    bodies: set[str] = set()
    candidates: list[tuple[str, Function, str]] = []
    for package in packages:
        for function in read_functions(find_package(package), package, records):
            if SKIPPED_NAMES.match(function.name):
                dropped["trivial name"] += 1
            elif function.body_lines < min_body_lines:
                dropped["short body"] += 1
            elif (sentence := first_sentence(function.docstring)) is None:
                dropped["no sentence fit for a query"] += 1
            elif (body := fingerprint(function.code)) in forbidden:
                dropped["excluded corpus"] += 1
            elif body in bodies:
                dropped["duplicate function"] += 1
            else:
                bodies.add(body)
                candidates.append((package, function, sentence))
    shared = Counter(_key(sentence) for _, _, sentence in candidates)
    pairs: list[TrainingPair] = []
    queries: set[str] = set()
    for package, function, sentence in candidates:
        if shared[_key(sentence)] > GENERIC_AFTER:
            dropped["generic sentence"] += 1
            continue
        draw = random.Random(hashlib.blake2b(f"{seed}\t{function.id}".encode()).digest())
        text = function.documented if draw.random() < documented_share else function.code
        query = _styled(function, sentence, draw, web_share, name_share)
        if {_key(sentence), _key(query)} & queries:
            dropped["duplicate query"] += 1
            continue
        queries.update((_key(sentence), _key(query)))
        pairs.append(TrainingPair(function.id, query, _cut(text, max_chars), source=f"docstrings:{package}"))
    return pairs, dropped


def _key(text: str) -> str:
    return text.lower().rstrip(". ")


def _styled(function: Function, sentence: str, draw: random.Random, web_share: float, name_share: float) -> str:
    choice = draw.random()
    if choice < name_share:
        query = as_name_query(function.name, list(function.arguments), sentence, draw)
        if query is not None:
            return query
    if choice < name_share + web_share:
        return as_web_query(sentence, draw)
    return sentence if len(sentence.split()) <= MAX_WORDS else as_web_query(sentence, draw)
