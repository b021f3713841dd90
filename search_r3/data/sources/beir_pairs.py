"""Training pairs from a BEIR folder: title -> text, a sentence -> its abstract, and judged queries -> documents.

The sentence task is the inverse cloze task (Lee et al. 2019, https://arxiv.org/abs/1906.00300); claim-like sentences
are chosen, since they resemble claim-checking queries.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from search_r3.data.beir import BeirDataset, stable_order
from search_r3.data.pairs import TrainingPair
from search_r3.errors import InputError
from search_r3.hints import refuse_unknown

HOLD_OUT = ("number", "crc32")
"""What of a query's id decides whether it is held out for dev."""
MIN_TITLE_WORDS, MIN_TEXT_WORDS = 3, 20
NEAR_COPY = 0.6  # share of words two queries have in common (Jaccard) from which they count as near copies
MIN_CLAIM_WORDS, MAX_CLAIM_WORDS = 6, 32

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])")
_NOT_AN_END = re.compile(
    r"(\b(e\.g|i\.e|etc|vs|cf|al|fig|figs|eq|ref|refs|no|approx|dr|st|spp?|var|ca)|\b[A-Z])\.$", re.I
)
_LABEL = re.compile(
    r"^([A-Z][A-Z/&,\- ]{3,}[A-Z]|Conclusions?|Results?|Interpretation|Findings?)\s*(:|\.|—|-)?\s+(?=[A-Z])"
)
_LEAD_IN = re.compile(
    r"""^((taken|considered)\ together,?\s*|in\ (conclusion|summary|addition|this\ study|contrast|particular|turn),?\s*
        |(thus|therefore|hence|however|moreover|furthermore|additionally|importantly|finally|interestingly|notably
            |together|collectively|specifically|accordingly|conversely|nevertheless|nonetheless|also|consequently|overall|surprisingly|strikingly|remarkably|unexpectedly|similarly|indeed),?\s+
        |here,?\s+)*
        ((we|our|the|these|this|those|all)\b[^,;:]{0,60}?\b
            (show|shows|showed|shown|find|found|demonstrate|demonstrates|demonstrated|report|reveal|reveals|revealed
             |suggest|suggests|suggested|indicate|indicates|indicated|conclude|concluded|propose|provide\ evidence
             |establish|established|observed|confirm|confirmed|discovered|imply|identified|support\ the
             \ (idea|hypothesis|notion|concept|view))\ that\s+)?""",
    re.IGNORECASE | re.VERBOSE,
)
_CONCLUDES = re.compile(r"\b(conclu|show|demonstrat|suggest|indicat|reveal|found|find|evidence|together)", re.I)
_ASSERTS = re.compile(
    r"""\b(is|are|was|were|has|have|had|can|may|does|do|will|
        (increas|decreas|reduc|induc|inhibit|promot|regulat|mediat|caus|activat|prevent|improv|impair|enhanc|suppress
         |requir|play|contribut|bind|modulat|affect|control|lead|result|depend|express|encod|produc|protect|associat
         |block|maintain|trigger|drive|facilitat|correlat|occur|differ|interact|act|undergo|stimulat|predict|link
         |stabiliz|form|contain|provid|determin|exhibit)(s|es|ed|d|e)?)\b""",
    re.IGNORECASE | re.VERBOSE,
)
_TIED_TO_CONTEXT = re.compile(
    r"""^(this|these|those|that|it|its|they|their|such|both|here|he|she|there|one|another|other|also|each|some|but|and
        |or|to|for\ example|if|by|after|using|based|because|although|while|whereas|when|where|since|we|our|a\ total|as
        |patients\ were|in\ this|which|who|all\ patients|participants|among|consistent\ with|with\ respect|several
        |of\ (particular|those|the|these)
        |in\ a\ cohort|controls|blood\ samples|despite|for\ studying|a\ number)\b
        |\b(we|our|us|this\ (study|paper|article|review|report|trial|work|finding|analysis)|herein|the\ authors?
        |(results|data|findings)\ (show|suggest|indicate|demonstrate)
        |latter|former|respectively|95%|CI|randomly|were\ (recruited|enrolled|assessed|measured|identified|collected
        |searched|excluded|included|asked|analy[sz]ed|obtained|evaluated|examined|performed)|meta-analys[ei]s\ was
        |is\ (discussed|reviewed|described|unknown|unclear)|remains?|[Pp]\s*[<=>])\b|<|≤|=|\?$|[©®]|https?:""",
    re.IGNORECASE | re.VERBOSE,
)


def title_pairs(dataset: BeirDataset) -> tuple[list[TrainingPair], Counter[str]]:
    """Title -> text of every document that has both.

    Returns:
        The pairs, and the number dropped by reason.
    """
    pairs, dropped = [], Counter[str]()
    seen: set[str] = set()
    for document in dataset.corpus.values():
        title = " ".join(document.title.split()).strip(" []")
        title = title[:-1] if title.endswith(".") else title
        if len(title.split()) < MIN_TITLE_WORDS:
            dropped["short title"] += 1
        elif len(document.text.split()) < MIN_TEXT_WORDS:
            dropped["short text"] += 1
        elif title.lower() in seen:
            dropped["duplicate title"] += 1
        else:
            seen.add(title.lower())
            identity = f"title:{dataset.name}:{document.id}"
            pairs.append(TrainingPair(identity, title, document.text.strip(), source=f"titles:{dataset.name}"))
    return pairs, dropped


def cloze_pairs(
    dataset: BeirDataset, *, per_document: int = 1, seed: int = 0
) -> tuple[list[TrainingPair], Counter[str]]:
    """A claim-like sentence -> the title and the rest of its text, at most `per_document` for each document.

    Sentences in which the authors conclude something come first ("We found that X" gives the query "X"), then others in
    the order of a seeded hash.

    Args:
        dataset: the data set whose documents are used.
        per_document: maximum number of sentences for each document.
        seed: seed of the hash.

    Returns:
        The pairs, and the number of documents without a sentence and of duplicates.
    """
    if per_document < 1:
        raise InputError(f"per_document must be 1 or more, got {per_document}")
    pairs, dropped = [], Counter[str]()
    seen: set[str] = set()
    for document in dataset.corpus.values():
        sentences = split_sentences(document.text)
        claims = {number: claim for number, text in enumerate(sentences) if (claim := as_claim(text))}
        order = stable_order((str(number) for number in claims), _seed_of(seed, document.id))
        best = sorted(map(int, order), key=lambda number: not _CONCLUDES.search(sentences[number]))
        taken = 0
        for number in best:
            claim = claims[number]
            rest = " ".join(text for other, text in enumerate(sentences) if other != number)
            if taken == per_document or len(rest.split()) < MIN_TEXT_WORDS:
                break
            if claim.lower() in seen:
                dropped["duplicate sentence"] += 1
                continue
            seen.add(claim.lower())
            taken += 1
            identity = f"cloze:{dataset.name}:{document.id}:{number}"
            positive = f"{document.title} {rest}".strip()
            pairs.append(TrainingPair(identity, claim, positive, source=f"cloze:{dataset.name}"))
        if not taken:
            dropped["no claim-like sentence"] += 1
    return pairs, dropped


def query_pairs(
    dataset: BeirDataset,
    *,
    split: str,
    hold_out_modulus: int | None = None,
    hold_out: str = "number",
    graded: bool = False,
    max_positives: int = 8,
    reasoning: Mapping[str, str] | None = None,
) -> tuple[list[TrainingPair], Counter[str]]:
    """One pair for each query of a split and each document judged relevant for it, or one for each query (`graded`).

    Args:
        dataset: loaded with that split, so that it contains only its queries.
        split: used in the ids and the source's name.
        hold_out_modulus: leave out queries whose id is divisible by this number: they are the dev set. Near copies of
            them are left out too: SciFact negates claims ("increases" for "lowers"), and a twin with the same abstract
            among the training pairs would inflate the dev score.
        hold_out: what is divided: "number", an id that is a whole number, or "crc32", the CRC-32 of any id.
        graded: one pair for each query, with all relevant documents and their grades: one of the highest grade as its
            positive, the others in `positives`.
        max_positives: with `graded`, the most documents of a pair: those of the highest grades, among equals by a hash
            of query and document. Documents left out count as negatives of the query, so choose it large.
        reasoning: query id -> the reasoning of its pairs.

    Returns:
        The pairs, and the number dropped by reason.

    Raises:
        InputError: `hold_out_modulus` is given with "number", and an id is not a whole number; or `hold_out` is
            unknown.
    """
    pairs, dropped = [], Counter[str]()
    held: list[set[str]] = []
    refuse_unknown([hold_out], HOLD_OUT, "hold_out", what="value")
    if hold_out_modulus is not None:
        dev = [query_id for query_id in dataset.queries if is_held_out(query_id, hold_out_modulus, hold_out)]
        held = [_words(dataset.queries[query_id]) for query_id in dev]
        dropped["held out for dev"] += len(dev)
    traces, text_of = reasoning or {}, dict[str, str]()
    for query_id, query in dataset.queries.items():
        if hold_out_modulus is not None and is_held_out(query_id, hold_out_modulus, hold_out):
            continue
        asked = _words(query)
        if any(len(words & asked) >= NEAR_COPY * len(words | asked) for words in held):
            dropped["near copy of a held-out query"] += 1
            continue
        relevant: dict[str, int] = {}
        for document_id, grade in dataset.qrels.get(query_id, {}).items():
            text_of.setdefault(document_id, dataset.corpus[document_id].full_text)
            if grade <= 0 or not text_of[document_id]:
                dropped["judged not relevant"] += 1
            else:
                relevant[document_id] = grade
        identity, source = f"query:{dataset.name}:{split}:{query_id}", f"queries:{dataset.name}/{split}"
        pair = TrainingPair(identity, query.strip(), "", reasoning=traces.get(query_id) or None, source=source)
        if not graded:
            pairs += [replace(pair, id=f"{identity}:{d}", positive=text_of[d]) for d in relevant]
        elif relevant:
            order = stable_order(relevant, _seed_of(0, query_id))
            texts: dict[str, int] = {}
            for document_id in sorted(order, key=relevant.__getitem__, reverse=True):
                texts.setdefault(text_of[document_id], relevant[document_id])
            (positive, grade), *further = list(texts.items())[:max_positives]
            dropped["over max_positives"] += max(0, len(texts) - max_positives)
            others = tuple((text, float(value)) for text, value in further)
            pairs.append(replace(pair, positive=positive, positives=others, grade=float(grade)))
    return pairs, +dropped


def is_held_out(query_id: str, modulus: int, rule: str = "number") -> bool:
    """Whether a query belongs to the dev set: int(query_id) % modulus == 0 for the rule "number", which is SciFact's,
    and zlib.crc32(query_id) % modulus == 0 for "crc32".

    Raises:
        InputError: the id is not a whole number, for "number".
    """
    if rule == "crc32":
        return zlib.crc32(query_id.encode("utf-8", "surrogatepass")) % modulus == 0
    if not query_id.isdecimal():
        raise InputError(
            f'cannot hold out queries by number: the id "{query_id}" is not a whole number; set hold_out: crc32'
        )
    return int(query_id) % modulus == 0


def split_sentences(text: str) -> list[str]:
    """The sentences of English prose; abbreviations and initials do not end one."""
    sentences: list[str] = []
    for part in _SENTENCE_END.split(" ".join(text.split())):
        if sentences and _NOT_AN_END.search(sentences[-1]):
            sentences[-1] += " " + part
        else:
            sentences.append(part)
    return [sentence for sentence in sentences if sentence]


def as_claim(sentence: str) -> str | None:
    """The sentence as a claim that stands on its own, or None: "We found that X does Y." -> "X does Y."."""
    text = _LABEL.sub("", sentence)
    text = _LEAD_IN.sub("", text, count=1).strip()
    text = re.sub(r"\s*[(\[][^()\[\]]*[)\]]", "", text)
    if not text or not MIN_CLAIM_WORDS <= len(text.split()) <= MAX_CLAIM_WORDS or not text.endswith("."):
        return None
    if _TIED_TO_CONTEXT.search(text) or not _ASSERTS.search(text) or text.count("(") or text.count(")"):
        return None
    digits = sum(character.isdigit() for character in text)
    if digits > 0.08 * len(text) or not text[0].isalnum() or _LABEL.match(text):
        return None
    return text[0].upper() + text[1:]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\t{name}".encode(), digest_size=6).digest())
