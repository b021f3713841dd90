"""Questions made from headings and docstrings by rules and a seeded random choice, and a filter for unsuitable ones.

A question must make sense without its document, fit no other document, and not be contained in its document; otherwise
the test would measure luck or exact matching. Every refusal has a reason, which the manifest counts.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Sequence

from search_r3.data.fresh.passages import Passage, plain_heading
from search_r3.data.mining.decontamination import jaccard
from search_r3.data.mining.word_overlap import words_of
from search_r3.data.sources.querystyle import (
    MAX_WEB_WORDS,
    VERBS,
    as_web_query,
    base_verb,
    first_sentence,
    without_markup,
)
from search_r3.data.stop_words import FUNCTION_WORDS

WEB_SHARE = 0.6
"""Share of docstring sentences rewritten as typed queries; the rest stay sentences (as in `data build`)."""
MIN_TELLING = 3
"""Minimum number of content words in a docstring's sentence."""
MIN_NAMED = 2
"""... and in a heading."""
TELLING_ALONE = 5
"""Number of content words from which a question need not name its package."""
MAX_WORDS = 20
"""Maximum number of words in a question: people rarely type more, and a truncated sentence often loses its meaning."""
COPIED = 4
"""A question of which this many consecutive words occur in its own document is dropped."""
ALIKE = 0.6
"""Share of common content words from which two questions are duplicates."""
ELSEWHERE = 5
"""A question of which this many consecutive words occur in another document is dropped, since that may answer it
too."""
STOP = FUNCTION_WORDS | frozenset(
    """about after all also back before between each every false first get given last many more most must new next
    none one one's only other otherwise out over own per python return returns same set several single some those
    true two under up use used using via vs whether without""".split()  # noqa: SIM905 (a list of literals would be 30 lines)
)
COMMON = frozenset(
    """install installation installing usage example examples quick quickstart start started getting overview
    introduction intro feature features license licence change changelog changes contributing contribute development
    developing testing test tests requirement requirements dependency dependencies api reference references doc docs
    documentation note notes faq support credit credits acknowledgement acknowledgements acknowledgment acknowledgments
    author authors status roadmap content contents table configuration configure config option options parameter
    parameters argument arguments method methods function functions class classes attribute attributes output outputs
    input inputs basic basics advanced detail details summary background motivation limitation limitations known issue
    issues project structure related link links resource resources citation citing cite description setup setting
    settings local building build publishing publish release releases version versions command commands line cli
    library package packages module modules tip tips next step steps see security performance benchmark benchmarks
    design architecture contact layout tutorial tutorials guide guides work works working main general misc
    miscellaneous common core type types value values file files code data object objects helper helpers internal
    public base default defaults result results compatibility scope philosophy goals non stability supported support
    highlights ai notice disclaimer public surface model flow running run verification validation
    list lists dict string strings number numbers name names path paths index row rows item items element elements key
    keys byte bytes bool boolean int integer float array tuple text pair pairs field fields instance argument param
    property optional required specific simple generic custom valid empty size length count caller process existing
    small large full plain raw id ids""".split()  # noqa: SIM905
)
"""Words that occur in sections or functions of nearly every package."""
_VERSION = re.compile(r"\bv?\d+\.\d+(\.\d+)?\b|\b(19|20)\d\d-\d\d|\bunreleased\b", re.IGNORECASE)
_POINTS = re.compile(
    r"\b(this|these|those|above|below|here|former|latter|following|previous|said|see|phase|ticket|issue|PR)\b", re.I
)
_CODE = re.compile(r"[(){}\[\]=<>/\\|@$]|\w_\w|\.\w+\b(?<!\.\d)|--\w|::")
_SYMBOLS = re.compile(r"\w_\w|\bADR\b|\?.|[\[\]{}=<>|@$]|\(\s*\w*\s*,|\w\(|^(\w+\s){0,2}\w+:")
"""Code brackets in a sentence, or a label before a colon."""
_ARGUMENT = re.compile(r"(?<!`)`{1,2}[a-z]{1,12}`{1,2}|(?<![*\w])\*[a-z]+\*(?![*\w])")
"""A lower-case name in code markup: an argument, which is meaningless without the function."""
_QUESTION = re.compile(r"(how|what|why|when|where|which|who|can|does|do|is|are|should)\b.*", re.IGNORECASE)


def draft_questions(
    passages: Sequence[Passage], seed: int, named_share: float, dropped: dict[str, Counter[str]]
) -> dict[str, str]:
    """At most one question for each passage: {id: question}; `dropped[package]` counts the reasons for dropping others.

    The random choices depend only on the seed and the passage's id.
    """
    drafts: dict[str, tuple[Passage, str, str]] = {}
    for passage in passages:
        if passage.asked is None:
            continue
        draw = random.Random(hashlib.blake2b(f"{seed}\t{passage.id}".encode()).digest())
        if passage.kind == "section":
            core = plain_heading(passage.asked)
            is_code = passage.asked.lstrip("0123456789. ").startswith("`")
            question, reason = heading_question(core, passage.package, draw, named_share, may_be_verb=not is_code)
        else:
            sentence = first_sentence(passage.asked) or ""
            core = _subject(sentence)
            question, reason = docstring_question(core, passage.package, draw, named_share)
            if _ARGUMENT.search(passage.asked[: len(sentence)]):
                reason = reason or "names an argument"
        reason = reason or leak(passage, question, core)
        if reason:
            dropped[passage.package][reason] += 1
        else:
            drafts[passage.id] = passage, question, core
    asked = Counter(_key(text) for _, question, core in drafts.values() for text in {_key(question), _key(core)})
    texts = {one.id: _run(f"{one.title} {one.text}") for one in passages}
    kept: dict[str, str] = {}
    for identity, (passage, question, core) in drafts.items():
        if asked[_key(question)] > 1 or asked[_key(core)] > 1:
            dropped[passage.package]["fits several documents"] += 1
        elif _elsewhere(identity, core, texts):
            dropped[passage.package]["stands in another document"] += 1
        else:
            kept[identity] = question
    package = {identity: drafts[identity][0].package for identity in kept}
    for identity in _alike(kept, package):
        del kept[identity]
        dropped[package[identity]]["like another question"] += 1
    return kept


def heading_question(
    heading: str, package: str, draw: random.Random, named_share: float, may_be_verb: bool = True
) -> tuple[str, str]:
    """(question, "") from a plain heading, or ("", reason)."""
    words = words_of(heading)
    telling = telling_words(heading, package)
    if _VERSION.search(heading):
        return "", "heading with a version or date"
    if _CODE.search(heading):
        return "", "heading that is code"
    if not telling or len(words) > MAX_WORDS or not heading.isascii():
        return "", "heading that fits many sections"
    if _POINTS.search(heading):
        return "", "points at its surroundings"
    named = draw.random() < named_share or len(telling) < TELLING_ALONE
    if len(telling) < MIN_NAMED:
        return "", "heading of too few telling words"
    first, _, rest = heading.partition(" ")
    verb = _base_of_gerund(first) or (first.lower() if first.lower() in VERBS and rest else None)
    verb = verb if may_be_verb else None
    mentioned = set(words_of(package)) <= set(words)
    if _QUESTION.fullmatch(heading):
        question = heading.rstrip("?") + "?"
        return (f"{package}: {question}" if named and not mentioned else question), ""
    core = _plain_case(heading)
    if verb and rest:
        core = f"{'how to ' if draw.random() < 0.6 else ''}{verb} {_plain_case(rest)}"
    if named and not mentioned:
        core = f"{core} in {package}" if verb or draw.random() < 0.5 else f"{package} {core}"
    return core, ""


def docstring_question(sentence: str, package: str, draw: random.Random, named_share: float) -> tuple[str, str]:
    """(question, "") from a docstring's first sentence, or ("", reason) if there is no suitable one.

    A sentence of few content words names its package: "replace rule matches" alone could be any package's.
    """
    if not sentence:
        return "", "docstring without a sentence fit for a question"
    if _POINTS.search(sentence):
        return "", "points at its surroundings"
    if len(telling_words(sentence, package)) < MIN_TELLING:
        return "", "sentence of too few telling words"
    plain = without_markup(sentence) or sentence
    if _SYMBOLS.search(plain):
        return "", "sentence that is partly code"
    if len(plain.split()) > MAX_WORDS:
        return "", "sentence of too many words"
    named = draw.random() < named_share or len(telling_words(sentence, package)) < TELLING_ALONE
    question = plain.rstrip(".")
    if draw.random() < WEB_SHARE and len(plain.split()) <= MAX_WEB_WORDS:  # a longer one would be truncated
        question = as_web_query(plain, draw)
    if question.count("(") != question.count(")") or len(telling_words(question, package)) < MIN_TELLING:
        return "", "no question once it is shortened"
    if named and not set(words_of(package)) <= set(words_of(question)):
        place = re.search(r"\bpython\b", question)
        if question.endswith("?"):
            return f"{package}: {question}", ""
        question = (
            f"{question[: place.start()]}{package}{question[place.end() :]}" if place else f"{question} in {package}"
        )
    return question, ""


def leak(passage: Passage, question: str, core: str) -> str:
    """The reason for dropping a question whose words occur consecutively in its own document, else ""."""
    text = _run(f"{passage.title} {passage.text}")
    if _run(question) in text:
        return "stands in its own document"
    return "stands in its own document" if len(words_of(core)) >= COPIED and _run(core) in text else ""


def telling_words(text: str, package: str) -> set[str]:
    """The content words of a text: without stop words, common words of headings, the package's name, and the leading
    verb."""
    own = set(words_of(package)) | {re.sub(r"\W+", "", package.lower())}
    first = next(iter(text.split()), "")
    own |= {first.lower()} if base_verb(first) else set()
    plain = STOP | COMMON | own
    return {
        token.lower()
        for token in text.split()  # cross-platform is one word
        if any(len(word) > 1 and not word.isdecimal() and word not in plain for word in words_of(token))
    }


def _subject(sentence: str) -> str:
    """A sentence without a leading "name - ", its first article, and the text after a semicolon, a dash, "or None" or
    in trailing brackets."""
    text = re.sub(r"^([\w.-]+\s+(—|–|--|-)\s+)", "", sentence)
    text = re.split(r";|\s(?:—|–|--)\s|,? or None\b|, else \w+$", text.rstrip("."))[0]
    text = re.sub(r"\s*\([^()]*\)\W*$", "", text)
    return re.sub(r"^(A|An|The)\s+(?=\S)", "", text).strip()


def _alike(questions: dict[str, str], package: dict[str, str]) -> set[str]:
    """The questions that share nearly all content words with another question of the same package: either document may
    answer both."""
    words = {one: frozenset(telling_words(text, package[one])) for one, text in questions.items()}
    found: set[str] = set()
    for one, other in itertools.combinations(questions, 2):
        if package[one] == package[other] and jaccard(words[one], words[other]) >= ALIKE:
            found |= {one, other}
    return found


def _elsewhere(identity: str, core: str, texts: dict[str, str]) -> bool:
    run = _run(core)
    return run.count(" ") > ELSEWHERE and any(run in text for other, text in texts.items() if other != identity)


def _run(text: str) -> str:
    """The words of a text joined and surrounded by single spaces, so that whole words can be matched."""
    return f" {' '.join(words_of(text))} "


def _key(text: str) -> str:
    return _run(text).strip()


def _plain_case(text: str) -> str:
    """A heading without title case; names such as MLB, iCal or Blu-ray keep their capitals."""
    words = text.split()
    title_case = sum(word[:1].isupper() and word[1:].islower() for word in words) > len(words) / 2
    return " ".join(
        word.lower() if word[1:].islower() and (number == 0 or title_case) else word
        for number, word in enumerate(words)
    )


def _base_of_gerund(word: str) -> str | None:
    """Reading -> read, Writing -> write, Getting -> get; None for any other word."""
    stem = word.lower().removesuffix("ing")
    if stem == word.lower():
        return None
    return next((verb for verb in (stem, f"{stem}e", stem[:-1]) if verb in VERBS), None)
