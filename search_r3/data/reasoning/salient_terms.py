"""Reasoning traces built from word statistics: the terms that reasoning about a query should name.

A term is scored by its weight in the pair's own document and in the query's BM25 neighbors. This mixes terms that only
the answer contains with terms that the query makes likely, so that a model can learn to generate them, and an embedding
trained with them does not learn to trust them blindly (relevance-model feedback, Lavrenko & Croft 2001, reduced to one
line).
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs
from search_r3.data.reasoning.self_reasoning_pairs import rarity
from search_r3.data.sources.thesaurus import Thesaurus

NEIGHBORS = 4
BLOCK = 128
MAX_CHARS = 72
"""Maximum length; a trace must end well within its token budget, or a model learns traces that are cut off."""
OWN_WEIGHT = 0.5
"""Weight of the pair's own document relative to the mean of its query's neighbors."""
_TERM = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:-[A-Za-z0-9]+)*")
_PLAIN = frozenset(
    re.findall(
        r"\w+",
        """
    the and for with that this from are was were not but can may its into than then has have had been which when
    where who will would should could between these those their there also other such only more most some any each
    all both def self return returns none true false elif else try except raise import args kwargs str int float
    bool len isinstance print lambda class pass yield assert param params parameters type types value values name
    list dict tuple set get using used use whether given if in is it of on or to by as at an be we our you they do
    does
    """,
    )
)
"""Common words of prose and Python that indicate no topic."""


def add_salient(
    source: str | Path,
    output: str | Path,
    *,
    limit: int | None = None,
    terms: int = 5,
    scorer: Any = None,
    report: Any = None,
) -> dict[str, int]:
    """Write the pairs of `source` to `output`, the first `limit` of them with a reasoning trace by `write_salient`.

    Args:
        scorer: a `Scorer`; a trace is kept only if it raises the positive's rank (see `best_drafts`).

    Returns:
        counts: pairs, asked, kept.

    Raises:
        InputError: `source` cannot be read, or `output` cannot be written.
    """
    pairs = read_pairs(source)
    asked = len(pairs[:limit])
    written = write_salient(pairs, asked, terms, scorer, report)
    write_pairs(output, written)
    return {"pairs": len(pairs), "asked": asked, "kept": sum(1 for pair in written[:asked] if pair.reasoning)}


def write_salient(
    pairs: Sequence[TrainingPair], first: int | None = None, terms: int = 5, scorer: Any = None, report: Any = None
) -> list[TrainingPair]:
    """The pairs, the first ones with reasoning such as "migraine comorbidity: headache, panic; related: anxiety".

    The query's rarest words come before the colon, terms of its document and neighbors after it. If WordNet is
    installed, synonyms of the query's words and a definition of one are tried as well. With a scorer the most helpful
    draft is used, without one the first.

    Args:
        pairs: in the order in which they will be used for training.
        first: how many get reasoning (None: all); existing reasoning is kept.
        terms: maximum number of terms.
        scorer: see `add_salient`.
        report: called with (what, done, total).
    """
    from search_r3.retrievers.bm25 import BM25Retriever

    chosen = [i for i in range(len(pairs[:first])) if not pairs[i].reasoning]
    documents = [pair.positive for pair in pairs]
    bags = [Counter(_terms(text)) for text in documents]
    weight = rarity(" ".join(bag) for bag in bags)
    bm25 = BM25Retriever()
    bm25.index(documents)
    scores, near = bm25.search([pairs[i].query for i in chosen], NEIGHBORS)
    thesaurus = Thesaurus() if Thesaurus.found() else None
    drafts = {}
    for line, i in enumerate(chosen):
        found = [bags[j] for j, score in zip(near[line], scores[line], strict=True) if score > 0]
        named = salient(pairs[i].query, bags[i], found, weight, terms)
        drafts[i] = write_drafts(pairs[i].query, named, weight, thesaurus)
    if scorer is not None:
        best = best_drafts(pairs, drafts, scorer, report)
    else:
        best = {i: texts[0] for i, texts in drafts.items() if texts}
    return [replace(pair, reasoning=best[i]) if i in best else pair for i, pair in enumerate(pairs)]


def best_drafts(
    pairs: Sequence[TrainingPair], drafts: Mapping[int, Sequence[str]], scorer: Any, report: Any = None
) -> dict[int, str]:
    """For each pair, the draft that helps the scorer most, if any helps: pair index -> reasoning.

    The scorer ranks all positives for the query, and for the query followed by a draft. A draft helps if the rank of
    the pair's own document improves, or if it stays first with a larger relative lead (O1-Embedder also selects
    reasoning by its retrievers' scores, arXiv 2502.07555).
    """
    documents = list(dict.fromkeys(pair.positive for pair in pairs))
    column = {text: i for i, text in enumerate(documents)}
    with tempfile.TemporaryDirectory() as folder:
        scorer.prepare(documents, Path(folder), report)
        best: dict[int, str] = {}
        asked = [i for i, texts in drafts.items() if texts]
        for start in range(0, len(asked), BLOCK):
            block = asked[start : start + BLOCK]
            texts = [(i, text) for i in block for text in ("", *drafts[i])]
            scores_QN = scorer.score([f"{pairs[i].query} {text}".strip() for i, text in texts])
            standing = {}
            for (i, text), scores_N in zip(texts, scores_QN, strict=True):
                standing[i, text] = _standing(scores_N, column[pairs[i].positive])
            for i in block:
                helpful = [text for text in drafts[i] if standing[i, text] < standing[i, ""]]
                if helpful:  # the first of the drafts with the best rank: plain terms before synonyms and definitions
                    best[i] = min(helpful, key=lambda text, i=i: standing[i, text][0])  # type: ignore[misc]
            if report:
                report("queries scored", min(start + BLOCK, len(asked)), len(asked))
    return best


def _standing(scores_N: np.ndarray, own: int) -> tuple[int, float]:
    """(rank of `own`, negative lead over the best other document relative to its score): lower is better."""
    score = float(scores_N[own])
    rank = 1 + int((scores_N > score).sum())
    others_N = np.delete(scores_N, own)
    second = float(others_N.max()) if len(others_N) else 0.0
    return rank, -round((score - second) / max(abs(score), 1e-6), 4) if rank == 1 else 0.0


def salient(
    query: str, own: Counter[str], neighbors: Sequence[Counter[str]], weight: Mapping[str, float], terms: int
) -> list[str]:
    """The terms that reasoning should name, best first; [] if the documents have none that the query lacks."""
    said = set(_terms(query))
    score: dict[str, float] = defaultdict(float)
    for term in own:
        score[term] += OWN_WEIGHT * _importance(own, term, weight)
    for bag in neighbors:
        for term in bag:
            score[term] += (1 - OWN_WEIGHT) / len(neighbors) * _importance(bag, term, weight)
    ranked = sorted(score.items(), key=lambda item: (-item[1], item[0]))
    found: list[str] = []
    for term, _ in ranked:
        # "protein" and "proteins" in one trace would teach the model to repeat itself.
        if not any(_stem(term) == _stem(other) for other in (*said, *found)):
            found.append(term)
        if len(found) == terms:
            break
    return found


def write_drafts(
    query: str, named: Sequence[str], weight: Mapping[str, float], thesaurus: Thesaurus | None
) -> list[str]:
    """One or more lines of at most `MAX_CHARS` characters: terms alone, with synonyms, with a definition."""
    if not named:
        return []
    asked = list(dict.fromkeys(_terms(query)))
    rarest = sorted(asked, key=lambda word: -weight.get(word, 0.0))
    concepts = " ".join(sorted(rarest[:3], key=asked.index))
    half = (len(named) + 1) // 2
    core, related = list(named[:half]), list(named[half:])
    drafts = [_line(concepts, core, [], related)]
    senses = [(word, sense) for word in rarest[:4] if thesaurus and (sense := thesaurus.look_up(word))]
    synonyms = [other for _, sense in senses for other in sense.synonyms[:1] if _stem(other) not in map(_stem, asked)]
    if synonyms:
        drafts.append(_line(concepts, core, synonyms[:2], related[:1]))
    if senses:
        word, sense = senses[0]
        drafts.append(
            _line(f"{word} ({' '.join(sense.definition.split()[:7])})".replace(";", ","), core, [], related[:1])
        )
    return drafts


def _line(head: str, core: Sequence[str], synonyms: Sequence[str], related: Sequence[str]) -> str:
    def write(core: Sequence[str], synonyms: Sequence[str], related: Sequence[str]) -> str:
        line = f"{head}: {', '.join(core)}" if head else ", ".join(core)
        line += f"; also {', '.join(synonyms)}" if synonyms else ""
        return line + (f"; related: {', '.join(related)}" if related else "")

    core, synonyms, related = list(core), list(synonyms), list(related)
    while len(line := write(core, synonyms, related)) > MAX_CHARS and len(core) + len(synonyms) + len(related) > 1:
        max((related, synonyms, core), key=len).pop()
    return line


def _terms(text: str) -> list[str]:
    pieces = _TERM.findall(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text.replace("_", " ")))
    return [word for piece in pieces if len(word := piece.lower()) >= 3 and word not in _PLAIN]


def _stem(word: str) -> str:
    """A crude stem, which maps "protein" and "proteins", "store" and "storing" to the same string."""
    return word[:5] if len(word) > 5 else word.rstrip("s")


def _importance(bag: Counter[str], term: str, weight: Mapping[str, float]) -> float:
    count = bag[term]
    return weight.get(term, 0.0) * count / (count + 1.2) / (sum(bag.values()) + 10) ** 0.5
