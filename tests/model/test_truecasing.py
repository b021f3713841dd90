"""Queries in one case: they get the usual case of their words, all others and all documents stay as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.model.searchr3 import encode_as_text
from search_r3.model.text_limit import TextLimit, read_texts
from search_r3.model.tokenization import WholeTokens
from search_r3.model.truecasing import TRUECASER_FILE, Truecaser, in_one_case, query_normalizer, truecaser_note
from search_r3.training.lora.average import average_adapters

PROSE = [
    "The emperor Genghis Khan rode on. In Hungary the White House is unknown; a white horse is not.",
    "Later Genghis Khan died. Nobody in Hungary saw the White House on its hill, white as snow.",
    "It is DNA and white paint. Of all DNA in white cells, most is white.",
]
TYPED, WRITTEN = "did genghis khan see the white house in hungary?", "Did Genghis Khan see the White House in Hungary?"


@pytest.fixture(scope="module")
def truecaser() -> Truecaser:
    return Truecaser.learn(PROSE, sources=["prose"])


@pytest.fixture(scope="module")
def cased(tiny_adapter: Path, truecaser: Truecaser, tmp_path_factory: pytest.TempPathFactory) -> SearchR3:
    folder = tmp_path_factory.mktemp("cased")
    truecaser.save(folder / "cases.json")
    average_adapters([tiny_adapter], folder / "adapter", truecaser=folder / "cases.json")
    return SearchR3.from_pretrained(folder / "adapter", device="cpu")


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

    def test_digits_are_part_of_a_word(self) -> None:
        learned = Truecaser.learn(["of FOXO3 and the p53 gene"] * 2)
        assert learned("is foxo3 like p53 or foxo4?") == "Is FOXO3 like p53 or foxo4?"

    def test_punctuation_and_spaces_stay(self, truecaser: Truecaser) -> None:
        assert truecaser("  is (hungary)  in 'dna'?\n") == "  is (Hungary)  in 'DNA'?\n"

    def test_the_first_word_of_a_sentence_says_nothing_about_its_case_but_that_of_a_title_does(self) -> None:
        assert Truecaser.learn(["Apples fall. Apples rise."] * 3).words == {}
        assert Truecaser.learn([], titles=["Apples", "Apples"]).words == {"apples": "Apples"}

    def test_a_word_must_be_seen_twice_but_a_name_once(self) -> None:
        assert Truecaser.learn(["in Hungary"]).words == {}
        assert Truecaser.learn([], names=["Genghis Khan"]).words == {"genghis": "Genghis", "khan": "Khan"}

    def test_a_word_in_several_cases_is_written_in_the_usual_one(self) -> None:
        often = ["an Apple"] * 2 + ["an apple"] * 3
        assert Truecaser.learn(often)("buy an apple") == "Buy an apple"
        assert Truecaser.learn(often + ["an Apple"] * 2)("buy an apple") == "Buy an Apple"

    @pytest.mark.parametrize(
        ("query", "expected"),
        [("who is it", True), ("WHO IS IT NOW", True), ("Who Is The King", True), ("Who is it", False),
         ("Genghis Khan", False), ("New York Stock Exchange", False), ("123", False), ("東京", False)],
    )  # fmt: skip
    def test_which_queries_are_in_one_case(self, query: str, expected: bool) -> None:
        assert in_one_case(query) is expected


class TestFile:
    def test_it_comes_back_the_same(self, truecaser: Truecaser, tmp_path: Path) -> None:
        truecaser.save(tmp_path)
        loaded = Truecaser.load(tmp_path)
        assert (loaded.words, loaded.after, loaded.before) == (truecaser.words, truecaser.after, truecaser.before)
        assert loaded.hash == truecaser.hash
        assert loaded.sources == ["prose"]

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "words": [1]}'])
    def test_a_damaged_or_newer_file_is_refused_in_a_line(self, tmp_path: Path, content: str) -> None:
        (tmp_path / TRUECASER_FILE).write_text(content)
        with pytest.raises(InputError, match=TRUECASER_FILE):
            Truecaser.load(tmp_path)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"none\.json"):
            Truecaser.load(tmp_path / "none.json")


class TestModel:
    def test_queries_go_through_it_on_every_way_and_documents_do_not(self, cased: SearchR3, tiny_adapter: Path) -> None:
        plain = SearchR3.from_pretrained(tiny_adapter, device="cpu")
        (wanted,) = encode_as_text(cased.tokenizer, [WRITTEN])
        assert read_texts(cased, [TYPED], TextLimit(512), queries=True).rows == [WholeTokens(tuple(wanted))]
        assert read_texts(cased, [TYPED], TextLimit(512)).rows != [WholeTokens(tuple(wanted))]
        for reasoning in (False, True):
            typed, written = (cased.encode_query([query], reasoning=reasoning) for query in (TYPED, WRITTEN))
            assert np.array_equal(typed, written)
        assert np.array_equal(cased.encode_document([TYPED]), plain.encode_document([TYPED]))

    def test_indexes_stay_valid_but_caches_of_queries_do_not(self, cased: SearchR3, tiny_adapter: Path) -> None:
        plain = SearchR3.from_pretrained(tiny_adapter, device="cpu")
        assert cased.contract.document_space == plain.contract.document_space
        assert cased.contract_hash != plain.contract_hash
        assert cased.contract.to_dict()["format"] == 4

    def test_it_is_saved_with_the_model(self, cased: SearchR3, tmp_path: Path) -> None:
        cased.save_pretrained(tmp_path / "merged")
        loaded = SearchR3.from_pretrained(tmp_path / "merged", device="cpu")
        assert np.array_equal(loaded.encode_query([TYPED]), loaded.encode_query([WRITTEN]))
        assert loaded.contract_hash == cased.contract_hash

    def test_a_lost_or_exchanged_file_is_refused(self, cased: SearchR3, tmp_path: Path) -> None:
        folder = tmp_path / "adapter"
        shutil.copytree(cased.checkpoint.path, folder)
        record = json.loads((folder / TRUECASER_FILE).read_text())
        (folder / TRUECASER_FILE).write_text(json.dumps(record | {"words": ["Other"]}))
        with pytest.raises(InputError, match="does not match the contract"):
            SearchR3.from_pretrained(folder, device="cpu")
        (folder / TRUECASER_FILE).unlink()
        with pytest.raises(InputError, match=f"{TRUECASER_FILE} is not a truecaser"):
            SearchR3.from_pretrained(folder, device="cpu")

    def test_an_export_says_so(self, cased: SearchR3, tiny_adapter: Path) -> None:
        assert TRUECASER_FILE in truecaser_note(cased)[0]
        assert truecaser_note(SearchR3.from_pretrained(tiny_adapter, device="cpu")) == []

    def test_an_average_keeps_that_of_its_first_adapter(
        self, cased: SearchR3, tiny_adapter: Path, tmp_path: Path
    ) -> None:
        average_adapters([cased.checkpoint.path, tiny_adapter], tmp_path / "average")
        loaded = SearchR3.from_pretrained(tmp_path / "average", device="cpu")
        assert loaded.contract.truecaser == cased.contract.truecaser


def test_a_query_is_truecased_before_it_is_folded() -> None:
    assert query_normalizer(None, None) is None
    chained = query_normalizer(lambda query: f"[{query}]", Truecaser({"hungary": "Hungary"}, {}, {}))
    assert chained is not None
    assert chained("in hungary") == "[In Hungary]"
