"""The texts from which a query normalizer is learned: documents of data sets, training pairs, and a lexicon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from search_r3.data.beir import load_beir
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.pairs import read_pairs
from search_r3.data.sources.dictionaries import wordnet_names
from search_r3.errors import InputError
from search_r3.model.query_normalizer import QueryNormalizer
from search_r3.model.spelling import SpellingCorrector
from search_r3.model.truecasing import Truecaser


def learn_query_normalizer(
    corpora: Sequence[str | Path],
    *,
    pairs: str | Path | None = None,
    kinds: Sequence[str] = (),
    wordnet: bool = False,
    data_root: str | Path | None = None,
) -> QueryNormalizer:
    """A query normalizer learned from documents.

    Args:
        corpora: data sets, whose documents are read.
        pairs: a JSONL file of training pairs, whose positives teach spelling. Those of `kinds` ("debian" for the
            sources "debian:...") teach capitals too; identifiers and headings of others are in no usual case.
        kinds: see `pairs`.
        wordnet: add the names in WordNet.

    Raises:
        InputError: a data set is unknown or damaged, no pair is of one of the kinds, or WordNet is not installed.
    """
    sets = [load_beir(find_dataset(name, data_root)) for name in corpora]
    documents = [document for dataset in sets for document in dataset.corpus.values()]
    texts, titles = [document.text for document in documents], [document.title for document in documents]
    names = list(wordnet_names()) if wordnet else []
    read = read_pairs(pairs) if pairs else []
    cased = list(texts)
    for kind in kinds:
        found = [pair.positive for pair in read if pair.source.split(":")[0] == kind]
        if not found:
            where = f"{pairs} has no pair" if pairs else "there are no training pairs, so none"
            raise InputError(f"{where} of kind {kind!r}; name a kind of the sources of a file of pairs")
        cased += found
    return QueryNormalizer(
        Truecaser.learn(cased, titles, names),
        SpellingCorrector.learn([*texts, *titles, *names, *(pair.positive for pair in read)]),
        [
            *(dataset.name for dataset in sets),
            *(["training pairs"] if pairs else []),
            *kinds,
            *(["names of wordnet"] if wordnet else []),
        ],
    )
