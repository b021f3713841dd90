"""The texts from which a query normalizer is learned: documents of data sets, training pairs, and a lexicon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from search_r3.data.beir import load_beir
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.pairs import read_pairs
from search_r3.data.sources.dictionaries import wordnet_names
from search_r3.errors import InputError
from search_r3.model.query_normalizer import QueryNormalizer
from search_r3.model.spelling import LONGEST, SHORT, SpellingCorrector, is_correctable
from search_r3.model.truecasing import Truecaser


def learn_query_normalizer(
    corpora: Sequence[str | Path],
    *,
    pairs: str | Path | None = None,
    kinds: Sequence[str] = (),
    wordnet: bool = False,
    word_lists: Sequence[str | Path] = (),
    data_root: str | Path | None = None,
) -> QueryNormalizer:
    """A query normalizer learned from documents.

    Args:
        corpora: data sets, whose documents are read.
        pairs: a JSONL file of training pairs, whose positives teach spelling. Those of `kinds` ("debian" for the
            sources "debian:...") teach capitals too; identifiers and headings of others are in no usual case.
        kinds: see `pairs`.
        wordnet: add the names in WordNet.
        word_lists: files for `extend_query_normalizer`.

    Raises:
        InputError: a data set or word list is unknown or damaged, no pair is of one of the kinds, or WordNet is not
            installed.
    """
    lists = [(path, read_word_list(path)) for path in word_lists]
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
    learned = QueryNormalizer(
        Truecaser.learn(cased, titles, names),
        SpellingCorrector.learn([*texts, *titles, *names, *(pair.positive for pair in read)]),
        [
            *(dataset.name for dataset in sets),
            *(["training pairs"] if pairs else []),
            *kinds,
            *(["names of wordnet"] if wordnet else []),
        ],
    )
    return _extended(learned, lists)


def extend_query_normalizer(normalizer: QueryNormalizer, word_lists: Sequence[str | Path]) -> QueryNormalizer:
    """A query normalizer that leaves the words of lists alone too (`SpellingCorrector.with_words`).

    Args:
        word_lists: text files in UTF-8 of a word a line, with its frequency behind it if it is known, as in SymSpell's
            frequency dictionaries; those of a word that comes twice are added up. The frequencies of a list are
            compared with each other alone.

    Raises:
        InputError: a file is missing or damaged, or has no word that could be corrected.
    """
    return _extended(normalizer, [(path, read_word_list(path)) for path in word_lists])


def _extended(normalizer: QueryNormalizer, lists: Sequence[tuple[str | Path, dict[str, float]]]) -> QueryNormalizer:
    spelling = normalizer.spelling
    for _, words in lists:
        spelling = spelling.with_words(words)
    names = [f"words of {Path(path).name}" for path, _ in lists]
    return QueryNormalizer(normalizer.truecaser, spelling, [*normalizer.sources, *names])


def read_word_list(path: str | Path) -> dict[str, float]:
    """word -> frequency of a file for `extend_query_normalizer`; 0 where none is given.

    Raises:
        InputError: the file is missing or damaged, or has no word that could be corrected.
    """
    found: dict[str, float] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); name a text file in UTF-8, a word a line") from error
    for number, line in enumerate(lines, 1):
        word, _, rest = line.strip().replace("\t", " ").partition(" ")
        try:
            frequency = float(rest or 0)
        except ValueError:
            frequency = math.nan
        if not 0 <= frequency < math.inf:
            raise InputError(f"{path}, line {number}: {line.strip()[:60]!r} is not a word and its frequency")
        if word:
            found[word] = found.get(word, 0) + frequency
    if not any(map(is_correctable, found)):
        raise InputError(
            f"{path} has no word of {SHORT} to {LONGEST} letters from a to z; expected a word a line, and its "
            "frequency behind a space or tab, not a comma"
        )
    return found
