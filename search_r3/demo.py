"""The tour behind `search-r3 demo`: index this machine's Python standard library, ask five questions, show everything.

The corpus is real, is available on every machine that can run this program, and is read with `ast`, never imported. The
index is kept in the cache folder, so a second run starts immediately and an interrupted one resumes.
"""

from __future__ import annotations

import ast
import hashlib
import platform
import re
import shlex
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from search_r3.errors import InputError
from search_r3.index.build.build_index import build_index
from search_r3.index.run_search import Hit, SearchResult
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument
from search_r3.model.resolve import BUNDLED, cache_dir, cache_written, default_model, known_names
from search_r3.progress import on_terminal, progress_bar

if TYPE_CHECKING:
    from search_r3.model.searchr3 import SearchR3

QUESTIONS = {
    "how do I delete a folder with everything in it": ("shutil.rmtree",),
    "suggest the right spelling when the user mistypes a word": ("difflib.get_close_matches",),
    "remember the results of a slow function so that it is not computed twice": (
        "functools.lru_cache",
        "functools.cache",
    ),
    "run another program and get what it printed": (
        "subprocess.run",
        "subprocess.check_output",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
    ),
    "what is the middle value of a list of numbers": ("statistics.median",),
}
"""The questions, each with the passages that answer it."""
BUDGET = 32
TOP = 3
MAX_PASSAGES = 1500
MAX_TOKENS = 55_000
"""Number of tokens to index: under three minutes at 400 tokens per second (two CPU cores, float32)."""
TOKENS_AROUND = 10
"""Tokens that the chat template adds after each passage; the prefix is computed once for all."""
MIN_WORDS = 8
MAX_SIGNATURE = 36
MAX_DOCSTRING = 108
COMMIT_EVERY = 128
MAX_WIDTH = 110
SKIPPED = set(
    """
    test tests site-packages dist-packages ensurepip encodings pydoc_data lib2to3 idlelib tkinter turtle
    turtledemo pickletools aifc asynchat asyncore cgi cgitb chunk crypt distutils imghdr imp mailcap msilib
    nntplib pipes smtpd sndhdr sunau telnetlib uu xdrlib
    """.split()  # noqa: SIM905 (a list of literals would be 40 lines)
)
"""Folders and modules to skip: tests, packages that Debian splits off, and modules removed in newer versions of
Python."""


# --------------------------------------------------------------------------------------------------------- the corpus


def standard_library(folder: Path | None = None) -> list[SourceDocument]:
    """Every public module, class and module-level function of the standard library that has a docstring.

    A passage is "module.function(signature)" as title and the docstring's beginning as text, of at least 8 words.
    Sorted by id.
    """
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    passages: dict[str, SourceDocument] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if SKIPPED.intersection(parts) or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        public = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and not n.name.startswith("_")]
        for node, name in ((tree, module), *((n, f"{module}.{n.name}") for n in public)):
            if document := _passage(node, name, file.relative_to(root).as_posix()):
                passages.setdefault(name, document)
    return [passages[name] for name in sorted(passages)]


def _passage(node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str, path: str) -> SourceDocument | None:
    text = beginning(ast.get_docstring(node) or "")
    if len(text.split()) < MIN_WORDS:
        return None
    signature = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
    if len(signature) > MAX_SIGNATURE:
        signature = signature[: MAX_SIGNATURE - 6].rsplit(",", 1)[0].rstrip("(") + ", ...)"
        signature = signature if signature.startswith("(") else "(...)"
    kind = type(node).__name__.removesuffix("Def").lower()
    metadata: dict[str, str | int | float | bool] = {"module": name.split(".")[0], "kind": kind}
    return SourceDocument(name, name + signature, text, metadata, path, getattr(node, "lineno", 1))


def beginning(docstring: str, limit: int = MAX_DOCSTRING) -> str:
    """A docstring's first paragraph on one line, cut at a word; if it is only a few words, with the next one.

    Examples (>>>) and the lines under headings are left out.
    """
    prose = re.sub(r"^[=~\-*]{3,}$", "", docstring.split(">>>")[0], flags=re.MULTILINE)
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", prose.strip())]
    text = paragraphs[0]
    if len(text.split()) < MIN_WORDS and len(paragraphs) > 1:
        text = f"{text} {paragraphs[1]}"
    return text if len(text) <= limit else text[: limit - 4].rsplit(" ", 1)[0] + " ..."


def choose(documents: list[SourceDocument], num_tokens: Callable[[str], int], seed: int = 0) -> list[SourceDocument]:
    """The shortest of `documents` that fit into 1,500 passages and 55,000 tokens; deterministic."""
    order = sorted(documents, key=lambda d: hashlib.blake2b(f"{seed}\t{d.id}".encode()).digest())
    chosen, left = [], MAX_TOKENS
    for document in order[:MAX_PASSAGES]:
        left -= num_tokens(f"{document.title} {document.text}") + TOKENS_AROUND
        if left < 0:
            break
        chosen.append(document)
    return sorted(chosen, key=lambda d: (len(d.title) + len(d.text), d.id))


# ----------------------------------------------------------------------------------------------------------- the tour


@dataclass(frozen=True)
class Answer:
    """One question, asked both ways."""

    question: str
    expected: tuple[str, ...]
    off: SearchResult
    on: SearchResult


def run_demo(model_name: str | None = None, *, console: Console | None = None) -> list[Answer]:
    """Index, ask, and print the page. `model_name`: by default the default adapter.

    Raises:
        InputError: an unknown or damaged model, or the cache folder cannot be written.
    """
    console = console or Console()
    console.width = min(console.width, MAX_WIDTH)
    chosen = model_name or default_model()
    console.print(Rule("[bold]Search-R3[/] · retrieval that reasons before it embeds", style="cyan"))
    console.print()
    converts = chosen in BUNDLED or chosen in known_names()
    first = converts and not any((cache_dir() / "base").glob("*/config.json"))
    once = " (its base's weights are converted, once: a minute)" if first else ""
    print(f"loading {chosen}{once}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    model = _load(chosen)
    _say(console, "model ", f"{model.name}, {model.dimension} dimensions, {model.dtype}, loaded in {_since(started)}")
    folder = cache_dir() / "demo" / f"{model.name}-{model.contract_hash[:12]}"
    with cache_written():
        index = _index(folder, model, console)
    index.search("warm up", model, mode="vector", max_reasoning_tokens=1)  # the first pass includes set-up
    answers = []
    for number, (question, expected) in enumerate(QUESTIONS.items(), start=1):
        off = index.search(question, model, mode="vector", k=TOP, reasoning=False)
        on = index.search(question, model, mode="vector", k=TOP, reasoning=True, max_reasoning_tokens=BUDGET)
        answers.append(Answer(question, expected, off, on))
        _print_answer(console, number, answers[-1])
    _print_summary(console, answers)
    _print_next(console, folder)
    return answers


def _load(name: str) -> SearchR3:
    from search_r3.model.processor import fastest_dtype
    from search_r3.model.searchr3 import SearchR3

    return SearchR3.from_pretrained(name, dtype=fastest_dtype())


def _index(folder: Path, model: SearchR3, console: Console) -> SearchIndex:
    tokenizer = model.tokenizer
    documents = choose(standard_library(), lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    if not documents:
        raise InputError(
            "no docstrings in this Python's standard library (python -OO?); use search-r3 index on a folder"
        )
    with _progress(documents, "checking the index in the cache" if _is_complete(folder) else "indexing") as fed:
        report = build_index(folder, fed, model, progress=False, commit_every=COMMIT_EVERY)
    what = f"{len(documents):,} docstrings of Python {platform.python_version()}'s standard library"
    if report.embedded:
        per_second = report.embedded / report.seconds
        what += f", {report.embedded:,} embedded in {report.seconds:.0f} s ({per_second:.0f} per second)"
    else:
        what += ", found in the cache"
    _say(console, "corpus", what)
    return SearchIndex.open(folder)


def _is_complete(folder: Path) -> bool:
    """Whether an earlier run finished the index, so that there is little or nothing to embed."""
    try:
        return SearchIndex.open(folder).complete
    except InputError:
        return False


@contextmanager
def _progress(documents: list[SourceDocument], doing: str) -> Iterator[Iterator[SourceDocument]]:
    """Yield `documents` while showing progress on stderr: a bar on a terminal, lines elsewhere."""
    if not on_terminal():
        yield _reporting(documents, doing)
        return
    with progress_bar(doing, len(documents), transient=True) as advance:
        yield _advancing(documents, advance)


def _advancing(documents: list[SourceDocument], advance: Callable[[int], None]) -> Iterator[SourceDocument]:
    for document in documents:
        yield document
        advance(1)


def _reporting(documents: list[SourceDocument], doing: str) -> Iterator[SourceDocument]:
    quarter = max(1, len(documents) // 4)
    for i, document in enumerate(documents):
        if i % quarter == 0:
            print(f"{doing}: {i:,} of {len(documents):,}", file=sys.stderr, flush=True)
        yield document


# ----------------------------------------------------------------------------------------------------------- the page


def _say(console: Console, label: str, text: str) -> None:
    line = Table.grid(padding=(0, 2))
    line.add_row(Text(label, style="cyan"), Text(text))
    console.print(line)


def _print_answer(console: Console, number: int, answer: Answer) -> None:
    console.print()
    console.print(Rule(Text(f"{number}. {answer.question}?", style="bold"), align="left", style="cyan"))
    trace = answer.on.reasoning
    if trace is not None:
        ended = "and then the embed token"
        if trace.forced:
            ended = f"cut off at {BUDGET}" if trace.num_tokens >= BUDGET else "no embed token, so it was added"
        reasoning = Text("reasoning: ", style="cyan")
        reasoning.append(printable(trace.text) or "(nothing)", style="italic")
        reasoning.append(f"  ({trace.num_tokens} tokens, {ended})", style="dim")
        console.print(Padding(reasoning, (0, 0, 1, 2)))
    table = Table.grid(expand=True, padding=(0, 2))
    for _ in range(2):
        table.add_column(ratio=1, overflow="fold")
    table.add_row(
        _verdict(answer, answer.off, "without reasoning"),
        _verdict(answer, answer.on, "with reasoning"),
    )
    ids_off, ids_on = {hit.id for hit in answer.off.hits}, {hit.id for hit in answer.on.hits}
    for rank, (left, right) in enumerate(zip(answer.off.hits, answer.on.hits, strict=False), start=1):
        table.add_row(
            _result(rank, left, left.id not in ids_on, left.id in answer.expected),
            _result(rank, right, right.id not in ids_off, right.id in answer.expected),
        )
    console.print(Padding(table, (0, 0, 0, 2)))


def found_at(answer: Answer, result: SearchResult) -> int | None:
    """The rank of the first expected passage, from 1; None if there is none among the results."""
    return next((rank for rank, hit in enumerate(result.hits, start=1) if hit.id in answer.expected), None)


def _verdict(answer: Answer, result: SearchResult, how: str) -> Text:
    """The head of a column: how it was asked, its time, and whether it found the expected passage."""
    text = Text(f"{how}, {_ms(result)}\n", style="cyan")
    rank = found_at(answer, result)
    if rank is None:
        return text.append(f"✗ {answer.expected[0]}", style="bold red")
    return text.append(f"✓ at {rank}", style="bold green")


def _result(rank: int, hit: Hit, only_here: bool, expected: bool) -> Text:
    text = Text(f"{rank}. ")
    text.append(f"{hit.score:.3f}{'*' if only_here else ' '} ", style="green" if only_here else "dim")
    text.append(printable(hit.id), style="bold")
    text.append(" ✓\n" if expected else "\n", style="bold green")
    text.append(printable(hit.snippet), style="dim")
    return text


def _print_summary(console: Console, answers: list[Answer]) -> None:
    same = sum(a.off.hits[0].id == a.on.hits[0].id for a in answers)
    ended = sum(1 for a in answers if a.on.reasoning and not a.on.reasoning.forced)
    off = sum(_total(a.off) for a in answers) / len(answers)
    on = sum(_total(a.on) for a in answers) / len(answers)
    found_off = sum(found_at(a, a.off) is not None for a in answers)
    found_on = sum(found_at(a, a.on) is not None for a in answers)
    console.print()
    console.print(Rule(style="cyan"))
    text = (
        f"{len(answers)} questions: the expected answer (✓) is among the first {TOP} for {found_off} without reasoning "
        f"and for {found_on} with it. Both ways agree on the best result in {same}; the model ended its reasoning "
        f"within the budget in {ended}. A question takes {off:.0f} ms without reasoning and {on:.0f} ms with it. The "
        "numbers are cosines; * marks a result that only this side has among its three."
    )
    console.print(Text(text))


def _print_next(console: Console, folder: Path) -> None:
    program = "search-r3" if shutil.which("search-r3") else _beside_python()
    shown = shlex.quote(str(folder))
    with suppress(RuntimeError):  # no home
        if folder.is_relative_to(Path.home()) and shown == str(folder):
            shown = f"~/{folder.relative_to(Path.home())}"
    steps = (
        ("ask this index your own question", f'{program} search {shown} "how do I ..."'),
        ("search it in the browser", f"{program} serve {shown} --open"),
        (
            "index your own files and ask them",
            f"{program} index ~/notes --into notes-index\n{program} search notes-index '...'",
        ),
        ("see everything else", f"{program} --help"),
    )
    console.print()
    for what, command in steps:
        console.print(Text(f"To {what}:", style="cyan"))
        # A command is never wrapped, so that it can be copied from a narrow terminal too.
        for line in command.splitlines():
            console.print(Text(f"  {line}"), soft_wrap=True)


def _beside_python() -> str:
    """The program's path as the user can type it: relative where it lies below the working folder."""
    program = Path(sys.argv[0] if Path(sys.argv[0]).name == "search-r3" else Path(sys.executable).parent / "search-r3")
    program = program.absolute()
    return str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)


def printable(text: str) -> str:
    """`text` on one line without control characters: models may write anything."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else " " for c in text).split())


def _total(result: SearchResult) -> float:
    return result.timings.reason_ms + result.timings.search_ms


def _ms(result: SearchResult) -> str:
    milliseconds = _total(result)
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"


def _since(started: float) -> str:
    return f"{time.perf_counter() - started:.1f} s"
