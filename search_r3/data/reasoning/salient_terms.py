"""Reasoning traces written from words alone: the terms that reasoning about this query should name.

A term scores by its rarity in the pair's own document, and by how many of the query's BM25 neighbors use it: what only
the answer could know is mixed with what the query makes likely, so that a model can learn to say it, and an embedding
trained with it does not learn to trust it blindly. (Relevance-model feedback, Lavrenko & Croft 2001, cut to a line.)
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
"""A trace must end well within its budget of tokens, or a model learns to be cut off."""
OWN_WEIGHT = 0.5
"""How much the pair's own document counts against the mean of its query's neighbors."""
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
"""Words of prose and of Python that say nothing of a topic."""


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

    Before the colon stand the query's own rarest words, after it terms of its document and its neighbors. Where
    WordNet is installed, synonyms of the query's words and a definition of one are tried as well. With a scorer, the
    draft that helps most is taken; without, the first.

    Args:
        pairs: in the order in which they will be read.
        first: how many get reasoning (None: all); a pair that has some keeps it.
        terms: how many terms to name at most.
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
    """Of each pair's drafts the one that helps the scorer most, if it helps: pair index -> reasoning.

    The scorer ranks all positives by the query, and by the query followed by a draft. A draft helps if the pair's
    own document rises, or if it was first, stays so, and leads by a larger share of its score (O1-Embedder too
    keeps reasoning by its retrievers' scores, arXiv 2502.07555).
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
                if helpful:  # the first of those that raise it highest: plain terms before synonyms and definitions
                    best[i] = min(helpful, key=lambda text, i=i: standing[i, text][0])  # type: ignore[misc]
            if report:
                report("queries scored", min(start + BLOCK, len(asked)), len(asked))
    return best


def _standing(scores_N: np.ndarray, own: int) -> tuple[int, float]:
    """(rank of `own`, minus its lead over the best other as a share of its score): lower is better."""
    score = float(scores_N[own])
    rank = 1 + int((scores_N > score).sum())
    others_N = np.delete(scores_N, own)
    second = float(others_N.max()) if len(others_N) else 0.0
    return rank, -round((score - second) / max(abs(score), 1e-6), 4) if rank == 1 else 0.0


def salient(
    query: str, own: Counter[str], neighbors: Sequence[Counter[str]], weight: Mapping[str, float], terms: int
) -> list[str]:
    """The terms that reasoning should name, the best first; [] when the documents hold none that the query lacks."""
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
        # "protein" and "proteins" in one trace are a habit of repeating that the model would pick up.
        if not any(_stem(term) == _stem(other) for other in (*said, *found)):
            found.append(term)
        if len(found) == terms:
            break
    return found


def write_drafts(
    query: str, named: Sequence[str], weight: Mapping[str, float], thesaurus: Thesaurus | None
) -> list[str]:
    """One line or several, each at most `MAX_CHARS` long: terms alone, with synonyms, with a definition."""
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
    """Enough to see that "protein" and "proteins", "store" and "storing" are one word."""
    return word[:5] if len(word) > 5 else word.rstrip("s")


def _importance(bag: Counter[str], term: str, weight: Mapping[str, float]) -> float:
    count = bag[term]
    return weight.get(term, 0.0) * count / (count + 1.2) / (sum(bag.values()) + 10) ** 0.5
