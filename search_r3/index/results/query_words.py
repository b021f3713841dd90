"""What counts as a word in text search and highlights, and which words of a query are stop words."""

from __future__ import annotations

import re
import unicodedata

from search_r3.data.stop_words import FUNCTION_WORDS


def _marks() -> str:
    """The combining marks, as the content of a character class. Python's \\w leaves them out, but they are parts of
    words in Hindi and Thai, and of accented letters in decomposed form (NFD)."""
    ranges: list[list[int]] = []
    for code in (*range(0x300, 0x3100), *range(0xA600, 0xAC00), *range(0xFE00, 0xFE30)):
        if unicodedata.category(chr(code))[0] == "M":
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in ranges)


MARKS = _marks()
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
"""Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""
WORD = re.compile(rf"[^\W_{UNSPACED}]+(?:[{MARKS}]+[^\W_{UNSPACED}]*)*|(?:(?=[^\W_]|[{MARKS}])[{UNSPACED}])+")
"""A word, or a run of words without spaces between them; snake_case is several words."""
_UNSPACED_CHARACTER = re.compile(f"[{UNSPACED}]")
STOP_WORDS = FUNCTION_WORDS | {"but", "had", "me", "should", "will", "would"}
SHOUTING_WORDS = 4  # "HOW DO I OPEN IT" is a query in capitals; "WHO 2020" has a name in capitals
_SOFT_HYPHEN = re.compile(r"(?<=[^\W_])\u00ad+(?=[^\W_])")


def composed(text: str) -> str:
    """`text` in Unicode's composed form (NFC), without soft hyphens inside words; it looks the same.

    Documents and queries are normalized this way because the full-text index would split words at decomposed letters.
    """
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", _SOFT_HYPHEN.sub("", text))


def has_no_spaces(word: str) -> bool:
    """Whether a match of `WORD` may be several words of a script without spaces."""
    return not word.isascii() and bool(_UNSPACED_CHARACTER.match(word))


def is_stop_word(word: str, shouting: bool = False) -> bool:
    """Whether `word` is an English stop word. In capitals ("IT", "WHO") it is a name, unless the whole query is in
    capitals (`shouting`)."""
    return word.lower() in STOP_WORDS and (shouting or len(word) == 1 or not word.isupper())


def corrections(query: str, normalized: str) -> str:
    """The words of a normalized query that the query as typed lacks in any case; "" if there are none."""
    typed = {word.casefold() for word in WORD.findall(query)}
    return " ".join(word for word in WORD.findall(normalized) if word.casefold() not in typed)


def without_stop_words(query: str) -> str:
    """The query without English stop words; unchanged if it has no other words ("where not in", "The Who")."""
    shouting = query.isupper() and len(query.split()) >= SHOUTING_WORDS
    kept = WORD.sub(lambda match: " " if is_stop_word(match.group(), shouting) else match.group(), query)
    return kept if WORD.search(kept) else query
