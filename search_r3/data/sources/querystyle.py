"""Turning docstrings into search queries: the first sentence without markup, and the query that people would type.

People do not type "Return True if the path is absolute." but "python check if path is absolute" (see the questions of
CoSQA, https://arxiv.org/abs/2105.13239). The rewriting uses rules and seeded random choices, so it is reproducible.
"""

from __future__ import annotations

import inspect
import random
import re

MIN_WORDS, MAX_WORDS = 3, 40
MAX_WEB_WORDS = 12  # 97% of CoSQA's dev questions have at most this many words
MIN_LETTERS = 0.75  # minimum share of a query's characters that are ASCII letters or spaces

VERBS = frozenset(
    """
    accept access accumulate activate adapt add adjust advance aggregate align allocate analyze annotate append apply
    approximate arrange assemble assert assign attach average backup batch bind broadcast build bypass cache calculate
    call cancel capitalize cast center change check choose clamp clean clear clip clone close cluster collapse collect
    combine compare compile complete compose compress compute concatenate configure confirm connect construct consume
    convert convolve copy correct count create crop cut deactivate decode decompose decompress decorate decrease
    deduce define delete deserialize destroy detach detect determine differentiate disable discard disconnect dispatch
    display divide download draw drop dump duplicate edit embed emit emulate enable encode encrypt enforce ensure enter
    enumerate escape estimate evaluate exchange execute exit expand export extend extract factor fetch fill filter find
    finish fit fix flatten flip flush fold force format forward freeze gather generate get give grab group guess handle
    hash hide identify ignore import increase increment indent infer init initialize inject insert inspect install
    instantiate integrate interpolate intersect inverse invert invoke iterate join keep kill launch limit list listen
    load locate lock log lookup look lower make manage map mark mask match measure merge minimize mix modify monitor
    move multiply normalize notify obtain open optimize order overwrite pack pad parse partition pass patch perform
    permute pick plot pop populate post predict prepare prepend preprocess print process produce project propagate
    provide prune pull push put query quantize queue quote raise randomize rank read rebuild receive reconstruct record
    redirect reduce refresh register release reload remove rename render reorder repeat replace report represent
    request reset reshape resize resolve restore restrict resume retrieve retry return reverse rewrite rotate round run
    sample save scale scan scatter schedule search select send separate serialize serve set shift show shuffle shut
    shutdown simplify simulate skip slice smooth solve sort specify split squeeze stack standardize start stop store
    stream strip submit substitute subtract suggest sum suppress swap switch synchronize take terminate test tile
    tokenize trace track train transfer transform translate transpose traverse trim truncate try turn uncompress undo
    uninstall unlock unpack unregister unwrap update upload upper use validate verify visit wait walk warn watch weight
    wrap write yield zip
    """.split()  # noqa: SIM905 (a list of literals would be 300 lines)
)

_SECTION = re.compile(
    r"""^\s*(
        (args|arguments|parameters?|params|returns?|raises|yields?|examples?|notes?|usage|references|see\ also|
         attributes|warnings?|keyword\ arguments|inputs?|outputs?|shape|example\ usage|todo|warns)\s*:{0,2}\s*$
        | [-=~^]{3,}\s*$ | >>> | \.\.\s | :\w+[^:`]*:(\s|$) | @\w+ | ``` | \w+\ \(.*\)\s*(:|$)
        | [-*]\s | \w+\s*(\([^)]*\))?\s*:\s*\S | \|
    )""",
    re.IGNORECASE | re.VERBOSE,
)
_SIGNATURE = re.compile(r"^[\w.]+\s*\([^)]*\)?.*(->|\)\s*$|=\s*[\w.]+\s*\()")
_UNWANTED = re.compile(
    r"""deprecat|obsolete|\btodo\b|\bfixme\b|\bxxx\b|internal\s+use|not\s+implemented|^see\b|see\ also|^\W*inherited
        |overrid|^same\ as\b|^like\ |^alias|^equivalent\ (of|to)|^implements?\ |subclass|this\ (class|mixin|module)\b
        |^(constructor|initializer|init)\b|^initiali[sz]es?\ (self|the\ class)|^the\ \[?\w+\]?\ forward\ method
        |^(private|internal)\b|^(\w+\ )?wrapper\b|^docstring|copied\ from|for\ more\ (details|information)
        |^(returns?|get|getter|setter)\ (self|none)\b|^(forward|backward)\ (pass|method|function)\b|^\w+\s+is\ not\b
        |^(called|invoked|used|handler)\b|^(this|it|note|todo|warning|if|when|for|we|you|i|please|not|no|use|must)\b
        |^calls?\ |^(is|are|was|has|can|should|will)\b|\s[.,;:](\s|$)|\(\s*\)|^marks?\ |\btest\ (case|that)\b|^marking
        |https?:|www\.|\bself\b|^args\b|^hook\b|^default\b|^helper\b|^(callback|visitor)\b|\bpep\s?\d
    """,
    re.IGNORECASE | re.VERBOSE,
)
_PREAMBLE = re.compile(
    r"""^(?:(this|the|a|an)\s+)?(?:(?:simple|small|convenience|static|private|internal)\s+)*
        (?:(?:helper|utility|class)\s+)?
        (?:function|method|routine|helper|utility|property|decorator|context\ manager)\s+
        (?:(?:that|to|which|used\ to|is\ used\ to|will|for)\s+|(?=\w+s\ )(?!is\ |was\ |has\ |does\ ))""",
    re.IGNORECASE | re.VERBOSE,
)
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|resp|approx|w\.r\.t|fig|eq|no|al|dr|mr)\.$", re.IGNORECASE)
_CLAUSE = re.compile(
    r"\s*(\(|;|:|,|\s--?\s|—|\bso that\b|\bsuch that\b|\bwhere\b|\bwhich\b|\bunless\b|\bin order to\b|\bbased on\b|"
    r"\baccording to\b|\bby\b|\busing\b|\bwhen\b|\bas\b|\bwith\b|\bif\b|\bfor\b|\bthat\b|\bto\b|\bfrom\b|\band\b)"
)
_TEST = re.compile(
    r"""(returns?|checks?|tests?|determines?|indicates?|tells?|verif(?:y|ies))?\s*
        (true|1|false|a\ bool(?:ean)?\ (?:indicating|that\ indicates))?\s*
        (?:,?\s*if\ and\ only\ if|iff|if|whether(?:\ or\ not)?|when)\s+(.*)""",
    re.IGNORECASE | re.VERBOSE,
)
_DANGLING = re.compile(
    r"(\s+(a|an|the|its|their|in|on|of|to|at|as|by|for|from|with|into|and|or|is|are|be|can|that|which|whose|only))+$"
)
_ARTICLES = re.compile(r"(\b(?:the|a|an)|(?<=\s)(?:given|specified|provided))\s+(?=\w)", re.IGNORECASE)


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring without reStructuredText, Google or NumPy markup; None if it is not usable as a
    query.

    Signatures, lists of arguments, deprecated or purely internal functions, sentences of fewer than 3 or more than 40
    words, and sentences that are mostly symbols or not in Latin script are rejected.
    """
    if re.search(r"deprecat", docstring[:400], re.IGNORECASE):
        return None
    lines: list[str] = []
    for line in inspect.cleandoc(docstring).splitlines():
        if not lines and (not line.strip() or _SIGNATURE.match(line.strip())):
            continue
        if not line.strip() or _SECTION.match(line):
            break
        lines.append(line.strip())
    text = without_markup(" ".join(lines))
    if text is None:
        return None
    sentence = _PREAMBLE.sub("", re.sub(r"\s*[:;,]+$", "", _cut_sentence(text)).strip())
    words = sentence.split()
    letters = sum((c.isascii() and c.isalpha()) or c == " " for c in sentence)
    real = sum(len(word) > 1 and word[0].isalpha() for word in words)
    if real < MIN_WORDS or len(words) > MAX_WORDS or letters < MIN_LETTERS * len(sentence):
        return None
    if _UNWANTED.search(sentence) or not sentence[0].isalpha():
        return None
    if sentence.count("(") != sentence.count(")") or sentence.count('"') % 2:
        return None
    return sentence[0].upper() + sentence[1:]


def without_markup(text: str) -> str | None:
    """Prose without roles, backquotes, links and emphasis; None if formulas make it unreadable."""
    text = re.sub(r"\[(`[^`\]]+`)\](\([^)]*\))?", r"\1", text)  # transformers: [`~a.B`]
    text = re.sub(r":math:`([^`\\{}^_]*)`", r"\1", text)
    if ":math:" in text or "\\" in text or "$" in text:
        return None
    text = re.sub(r"(:\w+)+:`~?([^`<]*?)\s*(<[^`>]*>)?`", lambda m: m[2].split(".")[-1] or m[2], text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}", r"\1", text)
    text = re.sub(r"`~(?:\w+\.)*(\w+)`", r"\1", text)
    text = re.sub(r"`{1,3}~?([^`]*)`{1,3}_{0,2}", r"\1", text)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)  # Markdown link
    text = re.sub(r"\s*\[[\w*]+\]_", "", text)  # citation
    text = re.sub(r"(?<!\w)(\*{1,2})(\w[^*]*?)\1(?!\w)", r"\2", text)
    text = re.sub(r"</?\w+[^>]*>", "", text)
    text = re.sub(r"^\s*(r|u)?\"+|\"{3}", "", text)
    text = re.sub(r"(?<=\w) s(?=\W|$)", "s", re.sub(r"\s+", " ", text)).strip()  # `array` s: the role's plural
    return None if re.search(r"[`{}|]|->|:\w+:", text) else text


def _cut_sentence(text: str) -> str:
    for match in re.finditer(r"[.!?](?=\s+[A-Z\"'(]|\s*$)", text):
        if not _ABBREVIATION.search(text[: match.end()]):
            return text[: match.end()]
    return text


# ----------------------------------------------------------------------------------------------- web search queries


def as_web_query(sentence: str, random_source: random.Random) -> str:
    """A sentence as typed into a search box: short, lower case, often with "python" somewhere."""
    core = re.sub(r"\s*\([^)]*\)", "", sentence.rstrip(".!? "))
    core = re.sub(r"[\"']", "", core)
    if len(core.split(": ")[0].split()) >= MIN_WORDS:
        core = core.split(": ")[0]
    core, is_verb = _as_command(core, random_source)
    if random_source.random() < 0.6:
        core = _ARTICLES.sub("", core)
    core = _shorten(core).lower() if random_source.random() < 0.95 else _shorten(core)
    core = re.sub(r"\s+", " ", core).strip(" .,:;-")
    return _with_python(core, is_verb, random_source)


def name_words(name: str) -> list[str]:
    """The words of an identifier: parse_dateString2 -> parse, date, string2."""
    parts = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)).split("_")
    return [part.lower() for part in parts if part]


def as_name_query(name: str, arguments: list[str], sentence: str, random_source: random.Random) -> str | None:
    """A query from a function's name and, if they add something, its arguments' nouns; None if it says too little.

    Names of three real words are used alone; shorter ones are extended by arguments or the docstring's end.
    """
    words = name_words(name)
    if not words or any(len(word) < 2 or not word.isascii() for word in words) or len(words) > 7:
        return None
    if words[0] in ("get", "set") and len(words) < 3:
        return None
    extra = [w for a in arguments for w in name_words(a) if len(w) > 3 and w.isalpha() and w not in words]
    if len(words) < 3 or random_source.random() < 0.3:
        tail = re.search(r"\b(from|in|of|to|into|with|by|for)\s+(the|a|an)?\s*\w+(\s\w+)?\W*$", sentence.lower())
        if tail and random_source.random() < 0.6 and not set(name_words(tail[0])) & set(words):
            words += [re.sub(r"\W+$", "", _ARTICLES.sub("", tail[0]))]
        else:
            words += extra[:1]
    if len(" ".join(words).split()) < MIN_WORDS:
        return None
    known = sum(word in sentence.lower() or word in VERBS for word in words)
    if known * 2 < len(words):  # a name of abbreviations: nobody would type it
        return None
    return _with_python(" ".join(words), words[0] in VERBS, random_source)


def _with_python(core: str, is_verb: bool, random_source: random.Random) -> str:
    if re.search(r"\bpython", core):
        return core
    draw = random_source.random()
    if is_verb and draw < 0.3:
        return f"how to {core} in python"
    if draw < 0.6:
        return f"python {core}"
    if draw < 0.75:
        return f"{core} python"
    return f"{core} in python" if draw < 0.83 or len(core.split()) < MIN_WORDS else core


def _as_command(text: str, random_source: random.Random) -> tuple[str, bool]:
    """ "Returns True if x" -> "check if x"; "Computes x" -> "compute x"; and whether it begins with a verb."""
    test = _TEST.match(text)
    if test and (test[1] or test[2]) and (test[2] or "").lower() != "false":
        opening = "check if" if random_source.random() < 0.8 else "test if"
        rest = re.sub(r",?\s*(false|true)?\s*(otherwise|else|or false|and false).*$", "", test[3], flags=re.IGNORECASE)
        return f"{opening} {rest}", True
    first, _, rest = text.partition(" ")
    verb = base_verb(first)
    if verb is None:
        return text, False
    if verb in ("return", "retrieve", "obtain"):
        verb = random_source.choice(("get", "get", "return", "find" if rest.lower().startswith("the ") else "get"))
    return f"{verb} {rest}", True


def base_verb(word: str) -> str | None:
    """The base form of a known verb in base form or third person ("Applies" -> "apply"); None for any other word."""
    word = word.lower().rstrip(",")
    candidates = [word]
    if word.endswith("ies"):
        candidates.append(word[:-3] + "y")
    if word.endswith("es"):
        candidates.append(word[:-2])
    if word.endswith("s"):
        candidates.append(word[:-1])
    return next((candidate for candidate in candidates if candidate in VERBS), None)


def _shorten(text: str) -> str:
    """The text cut at the last clause boundary before the limit that leaves at least four words."""
    words = text.split()
    if len(words) <= MAX_WEB_WORDS:
        return text
    head = " ".join(words[: MAX_WEB_WORDS + 1])
    cuts = [match.start() for match in _CLAUSE.finditer(head) if len(head[: match.start()].split()) >= 4]
    return _DANGLING.sub("", head[: cuts[-1]] if cuts else " ".join(words[:MAX_WEB_WORDS]))
