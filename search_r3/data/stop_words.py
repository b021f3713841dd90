"""English stop words. Each use extends `FUNCTION_WORDS` by words that matter to it only."""

from __future__ import annotations

_WORDS = """
a an and any are as at be been by can could did do does for from has have how i if in into is it its my no not of on or
our so than that the their them then there these they this to was we were what when where which who why with you your
"""
FUNCTION_WORDS = frozenset(_WORDS.split())
"""Articles, pronouns, prepositions, conjunctions, auxiliaries and question words, in lower case."""
