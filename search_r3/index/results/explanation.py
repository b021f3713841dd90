"""Why hits were found, for people: marked words, weak hits, equal passages, and words that occur nowhere.

A hit is weak if its cosine is below what unrelated questions reach in the same index (`build/relevance_floor.py`), and
it has fewer than half of the question's words. A question of which no word occurs in the index is compared with others
of unknown words, whose cosines are higher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search_r3.index.backends.index_backend import IndexBackend, Row
from search_r3.index.results.query_words import WORD, has_no_spaces, without_stop_words
from search_r3.index.results.snippets import Snippet
from search_r3.index.results.word_marks import comparable, find_matches, joined, query_terms

MOST_WORDS = 12
"""Words of a question that are looked up in the index."""
QUESTION, REASONING = "question", "reasoning"
Mark = tuple[int, int, str]
"""Start and end of a word, and whose it is: `QUESTION` or `REASONING`."""


@dataclass(frozen=True)
class EqualPassage:
    """A passage with the same text as a hit, in another document."""

    id: str
    document: str
    path: str
    start_line: int


@dataclass(frozen=True)
class HitExplanation:
    """What there is to say about one hit.

    Attributes:
        marks: (start, end, "question" or "reasoning") in the hit's text: words of the question, and words that only the
            reasoning has.
        snippet_marks: the same in the snippet.
        snippet_span: (start, end) of the snippet in the hit's text.
        weak: the hit is no closer to the question than unrelated questions are, and shares few words with it.
        same: passages of other documents that have the same text; they are not among the hits.
    """

    marks: list[Mark]
    snippet_marks: list[Mark]
    snippet_span: tuple[int, int]
    weak: bool
    same: list[EqualPassage]


@dataclass(frozen=True)
class Explanation:
    """What there is to say about a search; `hits` explains each hit, in their order.

    Attributes:
        floor: the cosine that unrelated questions (or unknown words, if the question has no others) reach in this
            index; None if it was not measured.
        missing_words: words of the question that no passage of the index has.
    """

    hits: list[HitExplanation]
    floor: float | None
    missing_words: list[str]

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Explanation:
        """The explanation that `dataclasses.asdict` made `record` of; raises TypeError or KeyError for others."""
        hits = [
            HitExplanation(**{**hit, "same": [EqualPassage(**one) for one in hit["same"]]}) for hit in record["hits"]
        ]
        return cls(hits, record["floor"], list(record["missing_words"]))


@dataclass(frozen=True)
class Found:
    """A hit to be explained: its text, snippet, scores by list, and the rows with the same text."""

    text: str
    snippet: Snippet
    scores: Mapping[str, float]
    equal: Sequence[Row]


def explain(
    backend: IndexBackend, query: str, reasoning: str, found: Sequence[Found], *, by_meaning: bool
) -> Explanation:
    """Explain the hits of a search.

    Args:
        reasoning: what the model wrote or was given; "" without reasoning.
        by_meaning: the search compared vectors, by the model that the floor was measured with; otherwise no hit is
            weak.
    """
    asked = query_terms(query)
    thought = query_terms(reasoning) - asked if reasoning.strip() else set()
    seen = {term for one in found for _, _, term in one.snippet.matches}
    missing = missing_words(backend, query, seen)
    floor = _floor(backend, query, missing) if by_meaning else None
    hits = []
    for one in found:
        has = {term for _, _, term in one.snippet.matches}
        weak = floor is not None and one.scores.get("vector", -1.0) < floor and 2 * len(has) < len(asked)
        hits.append(
            HitExplanation(
                *_marks(one.text, one.snippet, thought),
                (one.snippet.offset, one.snippet.end),
                weak,
                [EqualPassage(row["id"], row["document"], row["path"], row["start_line"]) for row in one.equal],
            )
        )
    return Explanation(hits, floor, missing)


def missing_words(backend: IndexBackend, query: str, seen: set[str]) -> list[str]:
    """The words of `query` that no passage has, in their order; none where words cannot be searched for.

    Args:
        seen: terms that are known to occur.
    """
    if "text" not in backend.capabilities or backend.full_text == "missing":
        return []
    unseen = [word for word in _words(query) if not has_no_spaces(word) and comparable(word) not in seen]
    return [word for word in unseen[:MOST_WORDS] if not backend.search_text(word, 1)]


def _words(query: str) -> list[str]:
    return list(dict.fromkeys(match.group() for match in WORD.finditer(without_stop_words(query))))


def _floor(backend: IndexBackend, query: str, missing: Sequence[str]) -> float | None:
    floor = backend.relevance_floor
    if floor is None:
        return None
    unknown = bool(missing) and len(missing) == min(len(_words(query)), MOST_WORDS)
    return floor.unknown_words if unknown else floor.questions


def _marks(text: str, snippet: Snippet, thought: set[str]) -> tuple[list[Mark], list[Mark]]:
    """The marks in a hit's text, and in its snippet."""
    marks: list[Mark] = []
    shown: list[Mark] = []
    for kind, matches in ((QUESTION, snippet.matches), (REASONING, find_matches(text, thought) if thought else [])):
        spans = joined(text, matches)
        marks += [(start, end, kind) for start, end in spans]
        shown += [(start, end, kind) for start, end in snippet.shown(spans)]
    return sorted(marks), sorted(shown)
