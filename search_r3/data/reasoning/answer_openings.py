"""Reasoning traces that say how the answer begins: the signature of a function, the first sentence of a text.

A language model can learn to guess an answer's first words, and they read like what is searched for (HyDE, arXiv
2212.10496, cut to a line); terms alone have no order that a small model could follow.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs
from search_r3.data.reasoning.salient_terms import MAX_CHARS

MIN_WORDS = 2
"""Shorter openings say too little to be searched with."""
_CODE = re.compile(r"^\s*(?:@[^\n]*\n\s*)*(?:async\s+)?(def|class)\s+(\w+)\s*(?:\(([^)]*)\))?", re.MULTILINE)
_ANNOTATION = re.compile(r"\s*[:=][^,]*")
_SENTENCE = re.compile(r"(?<=[.!?;])\s+(?=[A-Z0-9\"'(])")


def add_openings(source: str | Path, output: str | Path, *, limit: int | None = None) -> dict[str, int]:
    """Write the pairs of `source` to `output`, the first `limit` with the `opening` of their positive as reasoning.

    A pair that has reasoning keeps it.

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
    """How a document begins, on one line, cut at a word's end.

    Code gives "def name(a, b)" without annotations, defaults and decorators; prose its first sentence that is not the
    query itself. None if nothing of two words or more is left, or nothing but the query's own words.
    """
    code = _CODE.match(document)
    if code:
        kind, name, arguments = code.groups()
        names = [_ANNOTATION.sub("", part).strip() for part in (arguments or "").split(",")]
        kept = ", ".join(part for part in names if part and part not in ("self", "cls", "*", "/"))
        found = _cut(f"{kind} {name}({kept}" if kept else f"{kind} {name}", max_chars)
        # A list that was cut stays open; a model that learns to close it would learn to name too few.
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
