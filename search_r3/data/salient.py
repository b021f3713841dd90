"""Analyses written from words alone: the terms that an analysis of this query should have named.

A term scores by its rarity in the pair's own document, and by how many of the query's BM25 neighbours use it: what only
the answer could know is mixed with what the query makes likely, so that a model can learn to say it, and an embedding
trained behind it does not learn to trust it blindly. (Relevance-model feedback, Lavrenko & Croft 2001, cut to a line.)
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from search_r3.data.analyses import rarity
from search_r3.data.pairs import TrainingPair, read_pairs, write_pairs

NEIGHBOURS = 4
OWN_WEIGHT = 0.5
"""How much the pair's own document counts against the mean of its query's neighbours."""
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


def add_salient(source: str | Path, output: str | Path, *, limit: int | None = None, terms: int = 6) -> dict[str, int]:
    """Write the pairs of `source` to `output`, the first `limit` of them with an analysis by `write_salient`.

    Returns:
        counts: pairs, asked, kept.

    Raises:
        InputError: `source` cannot be read, or `output` cannot be written.
    """
    pairs = read_pairs(source)
    asked = len(pairs[:limit])
    analysed = write_salient(pairs, asked, terms)
    write_pairs(output, analysed)
    return {"pairs": len(pairs), "asked": asked, "kept": sum(1 for pair in analysed[:asked] if pair.analysis)}


def write_salient(pairs: Sequence[TrainingPair], first: int | None = None, terms: int = 6) -> list[TrainingPair]:
    """The pairs, the first ones with an analysis such as "migraine comorbidity: headache, panic; related: anxiety".

    Before the colon stand the query's own rarest words, behind it terms of its document and its neighbours.

    Args:
        pairs: in the order in which they will be read.
        first: how many get an analysis (None: all); a pair that has one keeps it.
        terms: how many terms to name at most.
    """
    from search_r3.retrievers.bm25 import BM25Retriever

    chosen = [i for i in range(len(pairs[:first])) if not pairs[i].analysis]
    documents = [pair.positive for pair in pairs]
    bags = [Counter(_terms(text)) for text in documents]
    weight = rarity(" ".join(bag) for bag in bags)
    bm25 = BM25Retriever()
    bm25.index(documents)
    scores, near = bm25.search([pairs[i].query for i in chosen], NEIGHBOURS)
    out = list(pairs)
    for line, i in enumerate(chosen):
        found = [bags[j] for j, score in zip(near[line], scores[line], strict=True) if score > 0]
        text = analysis(pairs[i].query, bags[i], found, weight, terms)
        out[i] = replace(pairs[i], analysis=text or None)
    return out


def analysis(
    query: str, own: Counter[str], neighbours: Sequence[Counter[str]], weight: dict[str, float], terms: int
) -> str:
    """One line, or "" when the document holds no term that the query lacks."""
    asked = _terms(query)
    said = set(asked)
    score: dict[str, float] = defaultdict(float)
    for term in own:
        score[term] += OWN_WEIGHT * _importance(own, term, weight)
    for bag in neighbours:
        for term in bag:
            score[term] += (1 - OWN_WEIGHT) / len(neighbours) * _importance(bag, term, weight)
    found = [term for term, _ in sorted(score.items(), key=lambda item: (-item[1], item[0])) if term not in said][
        :terms
    ]
    if not found:
        return ""
    concepts = sorted(dict.fromkeys(asked), key=lambda word: -weight.get(word, 0.0))[:3]
    concepts.sort(key=asked.index)
    half = (len(found) + 1) // 2
    line = f"{' '.join(concepts)}: {', '.join(found[:half])}" if concepts else ", ".join(found[:half])
    return line + (f"; related: {', '.join(found[half:])}" if found[half:] else "")


def _terms(text: str) -> list[str]:
    pieces = _TERM.findall(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text.replace("_", " ")))
    return [word for piece in pieces if len(word := piece.lower()) >= 3 and word not in _PLAIN]


def _importance(bag: Counter[str], term: str, weight: dict[str, float]) -> float:
    count = bag[term]
    return weight.get(term, 0.0) * count / (count + 1.2) / (sum(bag.values()) + 10) ** 0.5
