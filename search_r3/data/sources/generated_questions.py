"""Training pairs from encyclopedia articles: a question made from a sentence -> its short answer.

"Hot Rod is an American car magazine." gives "what is an american car magazine" -> "Hot Rod"; "(born March 3, 1970)"
gives "when was Ann Lee born" -> "March 3, 1970". Rules over English prose, as in question generation by transformation
(Heilman and Smith 2010); half of the questions are in lower case.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator

from search_r3.data.beir import BeirDataset, stable_order
from search_r3.data.pairs import TrainingPair
from search_r3.data.sources.beir_pairs import split_sentences
from search_r3.errors import InputError

MAX_NAME_WORDS, MIN_QUESTION_WORDS, MAX_QUESTION_WORDS = 8, 5, 28
_BRACKETS = re.compile(r"\s*\([^()]*\)")
_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DATE = rf"(?:{_MONTH} \d{{1,2}}, \d{{4}}|\d{{1,2}} {_MONTH} \d{{4}}|{_MONTH} \d{{4}}|\d{{4}})"
_BORN = re.compile(rf"\([^()]*?\bborn (?:on )?({_DATE})")
_LIVED = re.compile(rf"\(({_DATE}) ?[–-] ?{_DATE}\)")
_HAPPENED = re.compile(
    r"\b(?:was|were) (?:first )?(released|founded|established|opened|built|published|formed|created|launched|completed|"
    rf"discovered|incorporated|introduced)\b[^.;]{{0,40}}?\b(?:on|in) ({_DATE})\b"
)
_PLACE = re.compile(
    r"\b(?:is|was) (located|situated|based|headquartered|born) (?:in|at) "
    r"((?:the )?[A-Z][\w'’-]*(?:,? (?:of |the )?[A-Z][\w'’-]*)*)"
)
_PRONOUN = re.compile(r"^(He|She|It|They) (?=[a-z])")
_TIED = re.compile(
    r"\b(this|these|those|former|latter|also|however|his|her|their|its|the (?:album|film|song|band))\b", re.I
)


def question_pairs(
    dataset: BeirDataset, *, per_document: int = 3, seed: int = 0
) -> tuple[list[TrainingPair], Counter[str]]:
    """Questions about the subject of each article -> the subject's name, a date or a place.

    Args:
        dataset: its documents' titles are names, and their texts begin with the name.
        per_document: maximum number of questions for each document.
        seed: seed of the hash by which they are chosen, and of their case.

    Returns:
        The pairs, and the number of documents without a question and of duplicates.
    """
    if per_document < 1:
        raise InputError(f"per_document must be 1 or more, got {per_document}")
    pairs, dropped, seen = [], Counter[str](), set[str]()
    for document in dataset.corpus.values():
        found = dict(_questions(document.title, document.text))
        chosen = stable_order(found, seed)[:per_document]
        if not chosen:
            dropped["no question"] += 1
        for number, question in enumerate(chosen):
            if question.lower() in seen:
                dropped["duplicate question"] += 1
                continue
            seen.add(question.lower())
            lower = random.Random(f"{seed}\t{question}").random() < 0.5
            identity = f"question:{dataset.name}:{document.id}:{number}"
            query = question.lower() if lower else f"{question[0].upper()}{question[1:]}?"
            pairs.append(TrainingPair(identity, query, found[question], source=f"questions:{dataset.name}"))
    return pairs, dropped


def _questions(title: str, text: str) -> Iterator[tuple[str, str]]:
    """(question, answer) of an article; questions begin in lower case and have no question mark."""
    name = _BRACKETS.sub("", " ".join(title.split())).strip()
    sentences = split_sentences(text)
    if not name or not sentences or len(name.split()) > MAX_NAME_WORDS:
        return
    opening = re.match(rf"(?:The )?{re.escape(name)}\b", sentences[0], re.I)
    first = sentences[0][opening.end() :] if opening else ""
    if opening is None or not first:
        return
    birth = _BORN.search(first) or _LIVED.search(first)
    person = birth is not None or any(sentence.startswith(("He ", "She ")) for sentence in sentences)
    who = "who" if person else "what"
    if birth is not None:
        yield f"when was {name} born", birth[1]
    definition = re.search(r"\b(is|was|are|were) ((?:an?|the|one of) .+)", _BRACKETS.sub("", first))
    if definition and len(_BRACKETS.sub("", first)[: definition.start()].split()) <= 4:
        yield from _fit(f"{who} {definition[1]} {definition[2]}", name, name)
    for sentence in sentences:
        plain = _BRACKETS.sub("", sentence)
        subject = _PRONOUN.match(plain) or re.match(rf"(?:The )?{re.escape(name)} ", plain, re.I)
        if subject is None:
            continue
        rest = plain[subject.end() :]
        if (event := _HAPPENED.search(rest)) and event.start() < 8:
            yield f"when was {name} {event[1]}", event[2]
        if (place := _PLACE.search(rest)) and place.start() < 8:
            yield f"where was {name} born" if place[1] == "born" else f"where is {name} {place[1]}", place[2]
        if sentence is not sentences[0] and (person or subject[0].strip() != "They"):
            yield from _fit(f"{who} {rest}", name, name)


def _fit(question: str, answer: str, name: str) -> Iterator[tuple[str, str]]:
    """The pair, if the question stands on its own, does not contain the answer, and names something."""
    question = question.strip().rstrip(".")
    words = question.split()
    named = any(word[0].isupper() or word[0].isdigit() for word in words[1:])
    fits = MIN_QUESTION_WORDS <= len(words) <= MAX_QUESTION_WORDS and named and not _TIED.search(question)
    if fits and name.lower() not in question.lower():
        yield question, answer
