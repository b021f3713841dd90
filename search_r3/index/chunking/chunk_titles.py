"""Titles of chunks that are too long to stand before a text: of the limit of tokens they get half."""

from __future__ import annotations

from search_r3.index.chunking.token_limit import TokenLimit

LONGEST_TOKEN = 20  # characters, on average over a text; only to keep very long titles away from the tokenizer
MORE = "…"


def split_title(title: str, tokens: TokenLimit) -> tuple[str, str]:
    """As many whole words of a title as half the limit holds, and the rest; characters of a word that is too long."""
    half = tokens.limit // 2
    start = title[: half * LONGEST_TOKEN]
    while start and tokens.count([start])[0] > half:
        start = start[: min(len(start) - 1, max(len(start) // 2, len(start) * half // tokens.count([start])[0]))]
    if len(start) < len(title) and not title[len(start)].isspace():
        words = start.rsplit(None, 1)
        start = words[0] if len(words) == 2 else start
    return start.rstrip(), title[len(start) :].strip()


def short_path(title: str, tokens: TokenLimit) -> str:
    """A path of headings, or of folders, within half the limit: the outer parts go first, then the end of the last."""
    half = tokens.limit // 2
    for separator in (" > ", "/"):
        while separator in title and tokens.count([title])[0] > half:
            title = MORE + separator + title.removeprefix(MORE + separator).partition(separator)[2]
            if title.count(separator) == 1:
                break
    if tokens.count([title])[0] <= half:
        return title
    return split_title(title, tokens)[0]
