"""Reasoning traces made of the answer's opening: the signature of a function, the first sentence of a text.

A language model can learn to predict an answer's first words, and they resemble the text to retrieve (HyDE, arXiv
2212.10496, reduced to one line); bare terms have no order that a small model could learn.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs
from search_r3.data.reasoning.salient_terms import MAX_CHARS

MIN_WORDS = 2
"""Minimum length; shorter openings carry too little information."""
_CODE = re.compile(r"^\s*(?:@[^\n]*\n\s*)*(?:async\s+)?(def|class)\s+(\w+)\s*(?:\(([^)]*)\))?", re.MULTILINE)
_ANNOTATION = re.compile(r"\s*[:=][^,]*")
_SENTENCE = re.compile(r"(?<=[.!?;])\s+(?=[A-Z0-9\"'(])")


def add_openings(source: str | Path, output: str | Path, *, limit: int | None = None) -> dict[str, int]:
    """Write the pairs of `source` to `output`, the first `limit` of them with the `opening` of their positive as
    reasoning.

    Existing reasoning is kept.

    Returns:
        counts: pairs, asked, kept.

    Raises:
        InputError: `source` cannot be read, or `output` cannot be written.
    """
    pairs = read_pairs(source)
    asked = len(pairs[:limit])
    written = [_with_opening(pair) if i < asked else pair for i, pair in enumerate(pairs)]
    write_pairs(output, written)
    return {"pairs": len(pairs), "asked": asked, "kept": sum(1 for pair in written[:asked] if pair.reasoning)}


def opening(document: str, query: str = "", max_chars: int = MAX_CHARS) -> str | None:
    """A document's opening on one line, cut at a word boundary.

    For code it is "def name(a, b)" without annotations, defaults and decorators; for prose the first sentence that is
    not the query itself. None if fewer than two words are left, or only the query's own words.
    """
    code = _CODE.match(document)
    if code:
        kind, name, arguments = code.groups()
        names = [_ANNOTATION.sub("", part).strip() for part in (arguments or "").split(",")]
        kept = ", ".join(part for part in names if part and part not in ("self", "cls", "*", "/"))
        found = _cut(f"{kind} {name}({kept}" if kept else f"{kind} {name}", max_chars)
        # A truncated list stays open: closing it would teach the model to name too few items.
        return f"{found})" if kept and found.endswith(kept.rsplit(", ", 1)[-1]) and len(found) < max_chars else found
    asked = _words(query)
    for sentence in _SENTENCE.split(" ".join(document.split())):
        found = _cut(sentence, max_chars).rstrip(" .,;:")
        if len(found.split()) >= MIN_WORDS and _words(found) - asked:
            return found
    return None


def _with_opening(pair: TrainingPair) -> TrainingPair:
    return pair if pair.reasoning else replace(pair, reasoning=opening(pair.positive, pair.query))


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    return text[: max_chars + 1].rpartition(" ")[0].rstrip(" ,") or text[:max_chars]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
