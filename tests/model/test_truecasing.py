"""Queries in one case: they get the usual case of their words, all others stay as they are."""

from __future__ import annotations

import json
import time

import pytest

from search_r3.model.truecasing import Truecaser, in_one_case

PROSE = [
    "The emperor Genghis Khan rode on. In Hungary the White House is unknown; a white horse is not.",
    "Later Genghis Khan died. Nobody in Hungary saw the White House on its hill, white as snow.",
    "It is DNA and white paint. Of all DNA in white cells, most is white.",
]
TYPED, WRITTEN = "did genghis khan see the white house in hungary?", "Did Genghis Khan see the White House in Hungary?"


@pytest.fixture(scope="module")
def truecaser() -> Truecaser:
    return Truecaser.learn(PROSE)


class TestWords:
    @pytest.mark.parametrize("query", [TYPED, TYPED.upper(), TYPED.title()])
    def test_a_query_in_one_case_is_written_as_in_text(self, truecaser: Truecaser, query: str) -> None:
        assert truecaser(query) == WRITTEN

    @pytest.mark.parametrize(
        "query", [WRITTEN, "who was Genghis khan", "DNA tests", "Genghis Khan Hungary", "東京", "42", ""]
    )
    def test_any_other_query_stays_as_it_is(self, truecaser: Truecaser, query: str) -> None:
        assert truecaser(query) == query

    def test_a_word_is_spelled_by_its_neighbors_where_they_say_more(self, truecaser: Truecaser) -> None:
        assert truecaser("white cells in a white house") == "White cells in a White House"
        assert truecaser.spelling("white") == "white"
        assert truecaser.spelling("white", right="house") == "White"

    def test_every_sentence_begins_with_a_capital(self, truecaser: Truecaser) -> None:
        assert truecaser('a khan died. (he rode on) who? "nobody" knows e.g. so') == (
            'A Khan died. (He rode on) who? "Nobody" knows e.g. so'
        )

    def test_a_possessive_is_written_as_the_word_itself(self, truecaser: Truecaser) -> None:
        assert truecaser("genghis khan's horse and hungary’s snow, it's dna's") == (
            "Genghis Khan's horse and Hungary’s snow, it's DNA's"
        )

    def test_code_keeps_its_case(self, truecaser: Truecaser) -> None:
        assert truecaser("hungary.khan() and dna_of genghis/khan") == "hungary.khan() and dna_of genghis/khan"

    def test_an_option_keeps_its_case(self, truecaser: Truecaser) -> None:
        assert truecaser("what is --khan, or --no-dna in hungary") == "What is --khan, or --no-dna in Hungary"

    def test_decomposed_letters_and_soft_hyphens_are_part_of_a_word(self, truecaser: Truecaser) -> None:
        assert truecaser("e\u0301khan in hun\u00adgary, khan") == "E\u0301khan in hun\u00adgary, Khan"
        assert truecaser("DANS L'E\u0301KHAN DE HUNGARY") == "Dans l'e\u0301khan de Hungary"

    @pytest.mark.parametrize("text", ["a " + "1" * 50_000, "Ab " + "1" * 50_000, "a " + "1\u0301" * 25_000])
    def test_many_digits_take_no_time(self, truecaser: Truecaser, text: str) -> None:
        started = time.thread_time()
        assert truecaser(text)[1:] == text[1:]
        assert time.thread_time() - started < 1

    def test_digits_are_part_of_a_word(self) -> None:
        learned = Truecaser.learn(["of FOXO3 and the p53 gene"] * 2)
        assert learned("is foxo3 like p53 or foxo4?") == "Is FOXO3 like p53 or foxo4?"

    def test_punctuation_and_spaces_stay(self, truecaser: Truecaser) -> None:
        assert truecaser("  is (hungary)  in 'dna'?\n") == "  is (Hungary)  in 'DNA'?\n"

    def test_the_first_word_of_a_sentence_says_nothing_about_its_case_but_that_of_a_title_does(self) -> None:
        assert Truecaser.learn(["Apples fall. Apples rise."] * 3).words == {}
        assert Truecaser.learn([], titles=["Apples", "Apples"]).words == {"apples": "Apples"}

    def test_a_word_needs_to_be_seen_once(self) -> None:
        assert Truecaser.learn(["in Hungary"]).words == {"hungary": "Hungary"}
        assert Truecaser.learn([], names=["Genghis Khan"]).words == {"genghis": "Genghis", "khan": "Khan"}

    def test_names_of_several_words_say_nothing_about_a_word_alone(self) -> None:
        learned = Truecaser.learn(["in New York City, in Kansas City, in Mexico City; a city, or the city of"])
        assert learned("the city is new york city") == "The city is New York City"
        assert Truecaser.learn(["in Kansas City, a city"] * 3, ["Quebec City", "City"])("a city") == "A city"

    def test_a_word_in_several_cases_is_written_in_the_usual_one(self) -> None:
        often = ["an Apple"] * 2 + ["an apple"] * 3
        assert Truecaser.learn(often)("buy an apple") == "Buy an apple"
        assert Truecaser.learn(often + ["an Apple"] * 2)("buy an apple") == "Buy an Apple"

    def test_a_curly_apostrophe_is_a_straight_one_and_stays(self) -> None:
        learned = Truecaser.learn(["who’s WHO’s, who's it: who's it", "of O’Neill"])
        assert learned("who’s o'neill or o’neill") == "Who’s O'Neill or O’Neill"

    def test_a_letter_that_is_two_in_lower_case_stays(self) -> None:
        assert Truecaser.learn(["in Ankara"])("İZMİR VE ANKARA İLE") == "İZMİR ve Ankara İLE"

    @pytest.mark.parametrize(
        ("query", "expected"),
        [("who is it", True), ("WHO IS IT NOW", True), ("Who Is The King", True), ("Who is it", False),
         ("Genghis Khan", False), ("New York Stock Exchange", False), ("123", False), ("東京", False)],
    )  # fmt: skip
    def test_which_queries_are_in_one_case(self, query: str, expected: bool) -> None:
        assert in_one_case(query) is expected


def test_its_record_gives_it_back(truecaser: Truecaser) -> None:
    loaded = Truecaser.from_record(json.loads(json.dumps(truecaser.to_record())))
    assert (loaded.words, loaded.after, loaded.before) == (truecaser.words, truecaser.after, truecaser.before)
