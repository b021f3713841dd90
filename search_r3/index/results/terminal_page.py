"""Printing a search result on the terminal: what was read, the reasoning, then the hits with file and line."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from search_r3.index.run_search import ReadPassage, SearchResult

SHOWN = 72
"""Characters that are shown of a passage that was read."""


def print_result(result: SearchResult, console: Console | None = None) -> None:
    """Print `result`; plain text if the output is not a terminal or NO_COLOR is set."""
    console = console or Console()
    for passage in result.read:
        console.print(_passage_read(passage), end="\n\n" if passage is result.read[-1] else "\n")
    if result.reasoning is not None:
        trace = Text("reasoning: ", style="cyan").append(_one_line(result.reasoning.text), style="italic")
        ended = ", cut off" if result.reasoning.forced else ""
        console.print(trace.append(f"  ({result.reasoning.num_tokens} tokens{ended})", style="dim"), end="\n\n")
    if not result.hits:
        console.print("nothing found")
    for rank, hit in enumerate(result.hits, start=1):
        head = Text(f"{rank}. ").append(_one_line(hit.title or hit.document), style="bold")
        if hit.path:
            line_number = f":{hit.snippet_line}" if hit.snippet_line else ""  # records of JSONL and CSV have no lines
            head.append(f"  {_one_line(hit.path)}{line_number}", style="cyan")
        console.print(head.append(f"  {hit.score:.4f}", style="dim"))
        snippet = Text("".join(c if c.isprintable() or c == "\n" else " " for c in hit.snippet))
        for start, end in hit.highlights:
            snippet.stylize("bold yellow", start, end)
        for line in snippet.split("\n"):
            console.print(Text("   ").append_text(line))
        console.print()
    timings = result.timings
    console.print(Text(f"query {timings.reason_ms:.0f} ms, search {timings.search_ms:.0f} ms", style="dim"))


def _passage_read(passage: ReadPassage) -> Text:
    """One line: where the passage is from, and how what was read of it begins."""
    name = _one_line(passage.title or passage.document)
    text = _one_line(passage.text).removeprefix(name).strip()
    shown = text if len(text) <= SHOWN else text[:SHOWN].rstrip() + "..."
    return Text("read: ", style="cyan").append(name, style="bold").append(f"  {shown}", style="dim")


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
