"""Documents and questions: what is cut out of a package, what is asked of it, and what is not asked."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import fresh_packages as made
import pytest

from search_r3.data.fresh.fresh_config import FreshConfig, Source
from search_r3.data.fresh.passages import (
    Passage,
    markdown_sections,
    plain_heading,
    read_passages,
    rest_sections,
    without_first_paragraph,
)
from search_r3.data.fresh.questions import docstring_question, draft_questions, heading_question, leak, telling_words
from search_r3.data.fresh.release import read_source


def passages_of(path, **settings) -> tuple[dict[str, Passage], Counter[str]]:
    dropped: Counter[str] = Counter()
    config = FreshConfig((Source(str(path)),), **settings)
    return {one.id: one for one in read_passages(read_source(str(path)), config, dropped)}, dropped


def test_markdown_is_cut_at_headings_and_not_in_code():
    text = (
        "---\ntitle: x\n---\nlead\n# One\na\n```sh\n# not a heading\n```\n## Two ##\nb\n\nThree\n-----\nc\n# Four\nd\n"
    )
    assert [(s.above, s.heading, s.body.strip()) for s in markdown_sections(text)] == [
        ((), "", "lead"),
        ((), "One", "a\n```sh\n# not a heading\n```"),
        (("One",), "Two", "b"),
        (("One",), "Three", "c"),
        ((), "Four", "d"),
    ]


def test_restructured_text_is_cut_at_underlined_titles():
    found = [(s.above, s.heading) for s in rest_sections(made.GUIDE) if s.heading]
    assert found == [
        ((), "Guide"),
        (("Guide",), "Storm surges in shallow bays"),
        (("Guide", "Storm surges in shallow bays"), "Rivers"),
    ]


@pytest.mark.parametrize(
    ("heading", "plain"),
    [
        ("🚀 Getting *started*", "Getting started"),
        ("3.2 Reading `tides`:", "Reading tides"),
        ("Step 2: Cut the [table](#x)", "Cut the table"),
        ("2 harbours or more", "harbours or more"),
        ("What it __does__ <a id='x'></a>", "What it does"),
        ("A note on clocks", "A note on clocks"),
    ],
)
def test_headings_lose_their_markup(heading, plain):
    assert plain_heading(heading) == plain


def test_a_package_becomes_sections_classes_and_functions_without_what_is_asked(tmp_path):
    found, dropped = passages_of(made.wheel(tmp_path))
    assert Counter(one.kind for one in found.values()) == {"section": 5, "module": 1, "class": 1, "function": 2}
    datum = found["tidewater:README#4"]
    assert (datum.title, datum.asked) == ("tidewater", "Converting chart datums")
    assert datum.text.startswith("Heights are given")
    assert found["tidewater:README#5"].title == "tidewater - Converting chart datums"
    search = found["tidewater:tidewater.harmonics.Harbour.next_high_water"]
    assert search.text.startswith("def next_high_water(self, moment, tolerance=60):\n    The derivative changes")
    assert search.text.endswith("return (low + high) / 2")
    assert "bisection" not in search.text
    harbour = found["tidewater:tidewater.harmonics.Harbour"]
    assert harbour.text.startswith("class Harbour:\n    Constituents are kept by name.")
    assert "def next_high_water(moment, tolerance)" in harbour.text
    assert "measured" not in harbour.text
    assert dropped["short section"] == 1  # the words above the first heading
    assert all(not any(c.isspace() for c in one) for one in found)


def test_a_source_archive_gives_its_documentation_and_not_its_tests(tmp_path):
    found, _ = passages_of(made.sdist(tmp_path))
    surges = found["tidewater:docs/guide.rst#3"]
    assert (surges.title, surges.asked) == ("tidewater - Guide", "Storm surges in shallow bays")
    assert "The Harbour knows" in surges.text
    assert "tidewater:tidewater.harmonics.Harbour" in found  # without the archive's own folder and src/
    assert not any("test_it" in one for one in found)


def test_documents_can_be_left_out_and_are_cut(tmp_path):
    path = made.wheel(tmp_path)
    config = FreshConfig((Source(str(path)),), max_chars=200, kinds=("section", "function"))
    dropped: Counter[str] = Counter()
    found = read_passages(read_source(str(path)), config, dropped, ("tidewater/harmonics.py",))
    assert {one.kind for one in found} == {"section"}
    assert max(len(one.text) for one in found) <= 200
    assert dropped["file left out by the recipe"] == 1


def test_code_that_does_not_parse_or_decode_is_counted(tmp_path):
    files = {"a/one.py": "def (", "a/deep.py": "(" * 5000 + ")" * 5000, "a/zero.py": "x = 1\0"}
    _, dropped = passages_of(made.wheel(tmp_path, files=files, readme=made.README))
    assert dropped["file that does not parse"] == 2
    assert dropped["file with a NUL character"] == 1


def test_a_long_first_paragraph_loses_only_its_sentence():
    long = "Find it. " + "word " * 70
    assert without_first_paragraph(long + "\n\nRest.").startswith("word word")
    assert without_first_paragraph("Find it.\nQuickly.\n\n    Rest.") == "Rest."
    assert without_first_paragraph("Find it.") == ""


@pytest.mark.parametrize(
    ("heading", "reason"),
    [
        ("Installation", "many sections"),
        ("API Reference", "many sections"),
        ("Quick start guide", "many sections"),
        ("v1.4.0", "version"),
        ("1.4.0 - 2026-05-04", "version"),
        ("Unreleased", "version"),
        ("read_tides(path)", "code"),
        ("tidewater", "many sections"),
        ("Moon", "too few"),
        ("Using this with moons", "surroundings"),
        ("潮汐", "many sections"),
    ],
)
def test_headings_that_ask_nothing_are_refused_with_a_reason(heading, reason):
    question, why = heading_question(heading, "tidewater", random.Random(0), 0.5)
    assert question == ""
    assert reason in why


def test_headings_become_what_people_type():
    def asked(heading: str, named_share: float) -> set[str]:
        return {heading_question(heading, "tidewater", random.Random(n), named_share)[0] for n in range(30)}

    long = "Converting chart datums between neighboring harbour offices"
    core = long.removeprefix("Converting ")
    assert asked(long, 0) == {f"how to convert {core}", f"convert {core}"}
    assert asked(long, 1) == {f"how to convert {core} in tidewater", f"convert {core} in tidewater"}
    assert asked("Storm Surges", 0) == {"storm surges in tidewater", "tidewater storm surges"}  # too few words alone
    why = "Why do storm surges outrun lunar gravity in estuaries?"
    assert asked(why, 0) == {why}
    assert asked(why.rstrip("?"), 1) == {f"tidewater: {why}"}
    names = "Storm surges of NOAA stations in iCal calendars"
    assert asked(names, 0) == {f"storm{names[5:]}"}


@pytest.mark.parametrize(
    ("sentence", "reason"),
    [
        ("", "without a sentence"),
        ("Return the value of a key", "too few telling"),
        ("Search the tide tables of these harbours", "surroundings"),
        ("Write harbour tides to out_path quickly", "code"),
        ("Tides: harbour constituents written as amplitude", "code"),
        ("Search harbour tables " + "and again " * 12, "too many words"),
    ],
)
def test_sentences_that_ask_nothing_are_refused_with_a_reason(sentence, reason):
    question, why = docstring_question(sentence, "tidewater", random.Random(0), 0.5)
    assert question == ""
    assert reason in why


def test_sentences_become_what_people_type_and_name_the_package_where_they_say_little_alone():
    def asked(sentence: str, named_share: float) -> set[str]:
        return {docstring_question(sentence, "tidewater", random.Random(n), named_share)[0] for n in range(40)}

    short = asked("Replace seiche markers by placeholders", 0)
    assert all("tidewater" in question for question in short)
    assert {
        "tidewater replace seiche markers by placeholders",
        "Replace seiche markers by placeholders in tidewater",
    } <= short
    long = "Estimate slack current duration around lunar noon near estuaries"
    assert not any("tidewater" in question for question in asked(long, 0))
    assert all("tidewater" in question for question in asked(long, 1))


def test_telling_words_are_those_that_are_no_ones_heading():
    assert telling_words("Return the tidewater chart-datum of 3 files", "tidewater") == {"chart-datum"}


def one(identity: str, asked: str, text: str, kind: str = "function", package: str = "tidewater") -> Passage:
    return Passage(identity, package, kind, "", text, asked)


def test_no_question_stands_in_its_document_or_in_another():
    body = "def f(): # search the nearest harbour by bisection of table rows"
    sentence = "Search the nearest harbour by bisection of table rows."
    assert leak(one("a", sentence, body), "python search nearest harbour", sentence) == "stands in its own document"
    assert leak(one("a", "Harbour tables", "tides"), "harbour tables", "harbour tables") == ""
    assert leak(one("a", "Harbour tables", "Harbour tables!"), "harbour tables", "harbour tables") != ""
    dropped: dict[str, Counter[str]] = defaultdict(Counter)
    kept = draft_questions(
        [
            one("a", sentence, body),
            one("b", "Estimate slack current duration around lunar noon", "def g(): return 2"),
            one("c", "Interpolate amplitude corrections between neighboring lunar years", "def h(): return 3"),
            one("d", "Nothing", "x: interpolate amplitude corrections between neighboring lunar years"),
            one("e", "Plot residual surges against barometric pressure", "def i(): return 4"),
            one("f", "Plot residual surges against barometric pressure", "def j(): return 5", package="other"),
        ],
        0,
        0.5,
        dropped,
    )
    assert list(kept) == ["b"]
    assert dropped["tidewater"]["stands in its own document"] == 1
    assert dropped["tidewater"]["stands in another document"] == 1
    assert dropped["tidewater"]["fits several documents"] == dropped["other"]["fits several documents"] == 1


def test_two_questions_that_are_nearly_one_are_both_dropped():
    dropped: dict[str, Counter[str]] = defaultdict(Counter)
    passages = [
        one("a", "Write tidal harmonics image headers for harbours", "def f(): pass"),
        one("b", "Read tidal harmonics image headers for harbours", "def g(): pass"),
        one("c", "Estimate slack current duration around lunar noon", "def h(): pass"),
    ]
    assert list(draft_questions(passages, 0, 0.5, dropped)) == ["c"]
    assert dropped["tidewater"]["like another question"] == 2


def test_the_draw_depends_on_seed_and_document_alone(tmp_path):
    found, _ = passages_of(made.wheel(tmp_path))
    draws = [draft_questions(list(found.values()), seed, 0.5, defaultdict(Counter)) for seed in range(6)]
    assert draws[0] == draft_questions(list(found.values()), 0, 0.5, defaultdict(Counter))
    assert len({tuple(draw.items()) for draw in draws}) > 1
    fewer = draft_questions(list(found.values())[1:], 0, 0.5, defaultdict(Counter))
    assert all(draws[0][identity] == text for identity, text in fewer.items())
