"""Printing a search result on the terminal: what was read, the reasoning, then the hits with scores, file and line.

On a terminal, long lines are wrapped with an indent, and files are links (OSC 8); elsewhere lines stay whole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.text import Text

from search_r3.index.results.explanation import HitExplanation
from search_r3.index.results.places import place_of
from search_r3.index.run_search import Hit, ReadPassage, SearchResult

SHOWN = 72
"""Characters that are shown of a passage that was read."""
INDENT = "   "
MOST_NAMED = 4
"""Documents with the same text that are named."""
SCORE_NAMES = {"rerank": "relevance {:.2f}", "vector": "cosine {:.2f}", "text": "words {:.1f}"}
"""How the scores of a hit's lists are printed; "words" is BM25's score, "relevance" a reranker's."""


def print_result(
    result: SearchResult,
    console: Console | None = None,
    *,
    find_file: Callable[[str], Path | None] = lambda path: None,
    filtered: bool = False,
) -> None:
    """Print `result`; plain text if the output is not a terminal or NO_COLOR is set.

    Args:
        find_file: the file of a hit's path, which is linked.
        filtered: whether the search had a filter, which may be why nothing was found.
    """
    console = console or Console()
    if corrected := searched_as(result):
        console.print(Text(corrected, style="dim"), end="\n\n", soft_wrap=True)
    for passage in result.read:
        console.print(_passage_read(passage), end="\n\n" if passage is result.read[-1] else "\n")
    if result.reasoning is not None:
        trace = Text("reasoning: ", style="cyan").append(one_line(result.reasoning.text), style="italic")
        ended = ", cut off" if result.reasoning.forced else ""
        console.print(trace.append(f"  ({result.reasoning.num_tokens} tokens{ended})", style="dim"), end="\n\n")
    if not result.hits:
        console.print(Text(nothing_found(result, filtered)), soft_wrap=True)
    explained = result.explanation.hits if result.explanation is not None else [None] * len(result.hits)
    for warning in warnings_of(result):
        console.print(Text(warning, style="yellow"), soft_wrap=True)
    for rank, (hit, about) in enumerate(zip(result.hits, explained, strict=True), start=1):
        head = _head(hit, find_file)
        if about is not None and about.weak:
            head.append("  weak", style="yellow")
        _print_indented(console, head, f"{rank}. ")
        snippet = Text("".join(c if c.isprintable() or c == "\n" else " " for c in hit.snippet))
        for start, end in hit.highlights:
            snippet.stylize("bold yellow", start, end)
        for line in snippet.split("\n"):
            _print_indented(console, line, INDENT)
        if about is not None and about.same:
            _print_indented(console, Text(_same(about), style="dim"), INDENT)
        console.print()
    timings = result.timings
    model = "" if result.mode == "text" else f"model {timings.reason_ms:.0f} ms, "
    console.print(Text(f"{model}search {timings.search_ms:.0f} ms", style="dim"))


def _head(hit: Hit, find_file: Callable[[str], Path | None]) -> Text:
    """Title, file with line or page, and the scores; a title that is the file's path is not printed twice."""
    title, path = one_line(hit.title or hit.document), one_line(hit.path)
    head = Text()
    if not path or title != path:
        head.append(title, style="bold")
    if path:
        file = find_file(hit.path)
        link = Style(color="cyan", bold=not head, link=file.as_uri() if file is not None else None)
        head.append("  " if head else "").append(place_of(path, hit.snippet_line, hit.metadata), style=link)
    return head.append(f"  {scores_of(hit)}", style="dim")


def scores_of(hit: Hit) -> str:
    """ "cosine 0.74, words 5.8", as far as the hit has them."""
    return ", ".join(SCORE_NAMES[name].format(hit.scores[name]) for name in SCORE_NAMES if name in hit.scores)


def searched_as(result: SearchResult) -> str:
    """The query with its typos corrected, as its meaning was searched for; "" if there were none."""
    corrected = result.corrected_query
    return "" if corrected is None else f"searched by meaning as: {one_line(corrected)}"


def warnings_of(result: SearchResult) -> list[str]:
    """What a reader should know before the hits: that none fits well, and which words occur nowhere."""
    explanation = result.explanation
    if explanation is None or not result.hits:
        return []
    lines = ["nothing here matches well"] if all(hit.weak for hit in explanation.hits) else []
    if explanation.missing_words:
        lines.append(f"in no document: {', '.join(map(one_line, explanation.missing_words))}")
    return [*lines, ""] if lines else []


def _same(about: HitExplanation) -> str:
    count = len(about.same)
    names = ", ".join(one_line(passage.path or passage.document) for passage in about.same[:MOST_NAMED])
    more = ", ..." if count > MOST_NAMED else ""
    return f"+{count} {'document' if count == 1 else 'documents'} with the same text: {names}{more}"


def _print_indented(console: Console, line: Text, first: str) -> None:
    """Print `line` after `first`; on a terminal it is wrapped, and its other lines are indented as far."""
    width = max(20, console.width - len(first))
    parts = line.wrap(console, width) if console.is_terminal else [line]
    for number, part in enumerate(parts):
        part.rstrip()
        console.print(Text(first if number == 0 else " " * len(first)).append_text(part), soft_wrap=True)


def nothing_found(result: SearchResult, filtered: bool = False) -> str:
    """What to try after a search without hits."""
    where = " among those that --where selects" if filtered else ""
    if result.mode == "text":
        other = "; check --where, or" if filtered else ";"
        return f"nothing found: no chunk{where} has these words{other} try --mode hybrid"
    return "nothing found: --where selects nothing; check it" if filtered else "nothing found: the index is empty"


def _passage_read(passage: ReadPassage) -> Text:
    """One line: where the passage is from, and how what was read of it begins."""
    name = one_line(passage.title or passage.document)
    text = one_line(passage.text).removeprefix(name).strip()
    shown = text if len(text) <= SHOWN else text[:SHOWN].rstrip() + "..."
    return Text("read: ", style="cyan").append(name, style="bold").append(f"  {shown}", style="dim")


def one_line(text: str) -> str:
    """`text` without line breaks and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
