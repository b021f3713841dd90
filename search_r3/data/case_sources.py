"""The texts from which a truecaser (`search_r3.model.truecasing`) is learned: documents of data sets, and a lexicon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from search_r3.data.beir import load_beir
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.sources.dictionaries import wordnet_names
from search_r3.model.truecasing import Truecaser


def learn_truecaser(
    corpora: Sequence[str | Path], *, wordnet: bool = False, data_root: str | Path | None = None
) -> Truecaser:
    """A truecaser learned from the documents of data sets, and from WordNet's names if `wordnet` is true.

    Raises:
        InputError: a data set is unknown or damaged, or WordNet is not installed.
    """
    sets = [load_beir(find_dataset(name, data_root)) for name in corpora]
    documents = [document for dataset in sets for document in dataset.corpus.values()]
    return Truecaser.learn(
        (document.text for document in documents),
        (document.title for document in documents),
        wordnet_names() if wordnet else (),
        [*(dataset.name for dataset in sets), *(["wordnet"] if wordnet else [])],
    )
