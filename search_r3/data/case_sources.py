"""The texts from which a truecaser (`search_r3.model.truecasing`) is learned: documents of data sets, and a lexicon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from search_r3.data.beir import load_beir
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.pairs import read_pairs
from search_r3.data.sources.dictionaries import wordnet_names
from search_r3.errors import InputError
from search_r3.model.truecasing import Truecaser


def learn_truecaser(
    corpora: Sequence[str | Path],
    *,
    pairs: str | Path | None = None,
    kinds: Sequence[str] = (),
    wordnet: bool = False,
    data_root: str | Path | None = None,
) -> Truecaser:
    """A truecaser learned from documents.

    Args:
        corpora: data sets, whose documents are read.
        pairs: a JSONL file of training pairs, whose positives are read if they are of one of `kinds`: "debian" for the
            sources "debian:...".
        wordnet: add the names in WordNet.

    Raises:
        InputError: a data set is unknown or damaged, no pair is of one of the kinds, or WordNet is not installed.
    """
    sets = [load_beir(find_dataset(name, data_root)) for name in corpora]
    documents = [document for dataset in sets for document in dataset.corpus.values()]
    texts = [document.text for document in documents]
    read = read_pairs(pairs) if pairs and kinds else []
    for kind in kinds:
        found = [pair.positive for pair in read if pair.source.split(":")[0] == kind]
        if not found:
            raise InputError(f"{pairs or 'no file of pairs'} has no pair of kind {kind!r}; name a kind of its sources")
        texts += found
    return Truecaser.learn(
        texts,
        (document.title for document in documents),
        wordnet_names() if wordnet else (),
        [*(dataset.name for dataset in sets), *kinds, *(["names of wordnet"] if wordnet else [])],
    )
