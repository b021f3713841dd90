"""Shortening titles of chunks: a title gets at most half of the token limit."""

from __future__ import annotations

from search_r3.index.chunking.token_limit import TokenLimit

LONGEST_TOKEN = 20  # characters, as an average; only keeps very long titles away from the tokenizer
MORE = "…"


def split_title(title: str, tokens: TokenLimit) -> tuple[str, str]:
    """As many whole words of a title as fit into half the limit, and the rest; a word that is too long is split."""
    half = tokens.limit // 2
    start = title[: half * LONGEST_TOKEN]
    while start and tokens.count([start])[0] > half:
        start = start[: min(len(start) - 1, max(len(start) // 2, len(start) * half // tokens.count([start])[0]))]
    if len(start) < len(title) and not title[len(start)].isspace():
        words = start.rsplit(None, 1)
        start = words[0] if len(words) == 2 else start
    return start.rstrip(), title[len(start) :].strip()


def short_path(title: str, tokens: TokenLimit) -> str:
    """Shorten a path of headings or folders to half the limit: drop outer parts first, then the end of the last one."""
    half = tokens.limit // 2
    for separator in (" > ", "/"):
        while separator in title and tokens.count([title])[0] > half:
            title = MORE + separator + title.removeprefix(MORE + separator).partition(separator)[2]
            if title.count(separator) == 1:
                break
    if tokens.count([title])[0] <= half:
        return title
    return split_title(title, tokens)[0]
