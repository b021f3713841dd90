"""A checkpoint's query normalizer: its file, its place in the contract, and that documents do not go through it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.model.query_normalizer import (
    LONGEST,
    QUERY_NORMALIZER_FILE,
    QueryNormalizer,
    before_folding,
    query_normalizer_note,
)
from search_r3.model.searchr3 import encode_as_text
from search_r3.model.spelling import SpellingCorrector
from search_r3.model.text_limit import TextLimit, read_texts
from search_r3.model.tokenization import WholeTokens
from search_r3.model.truecasing import Truecaser
from search_r3.training.lora.average import average_adapters

PROSE = ["Later Genghis Khan saw Hungary. So Genghis Khan saw Hungary again, and saw snow in Hungary."]
TYPED, WRITTEN = "did genghis khan see hunfary?", "Did Genghis Khan see Hungary?"


@pytest.fixture(scope="module")
def normalizer() -> QueryNormalizer:
    return QueryNormalizer(Truecaser.learn(PROSE), SpellingCorrector(["hungary"], ["genghis"]), ["prose"])


@pytest.fixture(scope="module")
def normalized(tiny_adapter: Path, normalizer: QueryNormalizer, tmp_path_factory: pytest.TempPathFactory) -> SearchR3:
    folder = tmp_path_factory.mktemp("normalized")
    normalizer.save(folder / "words.json")
    average_adapters([tiny_adapter], folder / "adapter", query_normalizer=folder / "words.json")
    return SearchR3.from_pretrained(folder / "adapter", device="cpu")


def test_typos_are_corrected_before_case_is(normalizer: QueryNormalizer) -> None:
    assert normalizer(TYPED) == WRITTEN
    assert normalizer(TYPED.upper()) == WRITTEN
    assert normalizer("Did you see Hunfary?") == "Did you see Hungary?"
    assert normalizer(WRITTEN) == WRITTEN


def test_a_text_too_long_to_be_typed_stays_and_takes_no_time(normalizer: QueryNormalizer) -> None:
    assert normalizer(f"{TYPED:{LONGEST}}") == f"{WRITTEN:{LONGEST}}"
    text = "hunfary " * 200_000
    started = time.thread_time()
    assert normalizer(text) is text
    assert time.thread_time() - started < 0.1


class TestFile:
    def test_it_comes_back_the_same(self, normalizer: QueryNormalizer, tmp_path: Path) -> None:
        normalizer.save(tmp_path)
        loaded = QueryNormalizer.load(tmp_path)
        assert loaded(TYPED) == WRITTEN
        assert loaded.hash == normalizer.hash
        assert loaded.sources == ["prose"]

    @pytest.mark.parametrize(
        "content", ["", "[]", "{}", "[" * 100_000, '{"format": true}', '{"format": 1, "truecaser": {"words": [1]}}',
                    '{"format": 1, "truecaser": {"words": [], "after": [], "before": []}, "spelling": {}}'],
    )  # fmt: skip
    def test_a_damaged_file_is_refused_in_a_line(self, tmp_path: Path, content: str) -> None:
        (tmp_path / QUERY_NORMALIZER_FILE).write_text(content)
        with pytest.raises(InputError, match=rf"{QUERY_NORMALIZER_FILE} is not a query normalizer"):
            QueryNormalizer.load(tmp_path)

    @pytest.mark.parametrize(
        ("old", "new"),
        [('["prose"]', '"prose"'), ('"words": ["Genghis"', '"words": "Genghis", "": ["Genghis"'),
         ('"Genghis"', '"\\ud800"'), ('"hungary"', '["hungary"]'), ('"format": 1', '"format": "1"')],
    )  # fmt: skip
    def test_a_wrong_edit_is_refused_in_a_line(
        self, normalizer: QueryNormalizer, tmp_path: Path, old: str, new: str
    ) -> None:
        normalizer.save(tmp_path)
        text = json.dumps(json.loads((tmp_path / QUERY_NORMALIZER_FILE).read_text()))
        assert old in text
        (tmp_path / QUERY_NORMALIZER_FILE).write_text(text.replace(old, new, 1))
        with pytest.raises(InputError, match=rf"{QUERY_NORMALIZER_FILE} is not a query normalizer"):
            QueryNormalizer.load(tmp_path)

    def test_a_newer_file_asks_for_an_upgrade(self, tmp_path: Path) -> None:
        (tmp_path / QUERY_NORMALIZER_FILE).write_text('{"format": 2}')
        with pytest.raises(InputError, match=r"format 2, and this version reads 1; upgrade it$"):
            QueryNormalizer.load(tmp_path)

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"none\.json"):
            QueryNormalizer.load(tmp_path / "none.json")


class TestModel:
    def test_what_is_embedded_in_place_of_a_query_can_be_asked_for(
        self, normalized: SearchR3, tiny_adapter: Path
    ) -> None:
        assert normalized.normalize_query(TYPED) == WRITTEN
        assert normalized.normalize_query(WRITTEN) == WRITTEN
        assert SearchR3.from_pretrained(tiny_adapter, device="cpu").normalize_query(TYPED) == TYPED

    def test_queries_go_through_it_on_every_way_and_documents_do_not(
        self, normalized: SearchR3, tiny_adapter: Path
    ) -> None:
        plain = SearchR3.from_pretrained(tiny_adapter, device="cpu")
        (wanted,) = encode_as_text(normalized.tokenizer, [WRITTEN])
        assert read_texts(normalized, [TYPED], TextLimit(512), queries=True).rows == [WholeTokens(tuple(wanted))]
        assert read_texts(normalized, [TYPED], TextLimit(512)).rows != [WholeTokens(tuple(wanted))]
        for reasoning in (False, True):
            typed, written = (normalized.encode_query([query], reasoning=reasoning) for query in (TYPED, WRITTEN))
            assert np.array_equal(typed, written)
        assert np.array_equal(normalized.encode_document([TYPED]), plain.encode_document([TYPED]))

    def test_indexes_stay_valid_but_caches_of_queries_do_not(self, normalized: SearchR3, tiny_adapter: Path) -> None:
        plain = SearchR3.from_pretrained(tiny_adapter, device="cpu")
        assert normalized.contract.document_space == plain.contract.document_space
        assert normalized.contract_hash != plain.contract_hash
        assert normalized.contract.to_dict()["format"] == 4

    def test_it_is_saved_with_the_model(self, normalized: SearchR3, tmp_path: Path) -> None:
        normalized.save_pretrained(tmp_path / "merged")
        loaded = SearchR3.from_pretrained(tmp_path / "merged", device="cpu")
        assert np.array_equal(loaded.encode_query([TYPED]), loaded.encode_query([WRITTEN]))
        assert loaded.contract_hash == normalized.contract_hash

    def test_a_lost_or_exchanged_file_is_refused(self, normalized: SearchR3, tmp_path: Path) -> None:
        folder = tmp_path / "adapter"
        shutil.copytree(normalized.checkpoint.path, folder)
        record = json.loads((folder / QUERY_NORMALIZER_FILE).read_text())
        (folder / QUERY_NORMALIZER_FILE).write_text(json.dumps(record | {"sources": ["other"]}))
        with pytest.raises(InputError, match="does not match the contract"):
            SearchR3.from_pretrained(folder, device="cpu")
        (folder / QUERY_NORMALIZER_FILE).unlink()
        with pytest.raises(InputError, match=f"{QUERY_NORMALIZER_FILE} is not a query normalizer"):
            SearchR3.from_pretrained(folder, device="cpu")

    def test_an_export_says_so(self, normalized: SearchR3, tiny_adapter: Path) -> None:
        assert QUERY_NORMALIZER_FILE in query_normalizer_note(normalized)[0]
        assert query_normalizer_note(SearchR3.from_pretrained(tiny_adapter, device="cpu")) == []

    def test_an_average_keeps_that_of_its_first_adapter(
        self, normalized: SearchR3, tiny_adapter: Path, tmp_path: Path
    ) -> None:
        average_adapters([normalized.checkpoint.path, tiny_adapter], tmp_path / "average")
        loaded = SearchR3.from_pretrained(tmp_path / "average", device="cpu")
        assert loaded.contract.query_normalizer == normalized.contract.query_normalizer


def test_a_query_is_normalized_before_it_is_folded(normalizer: QueryNormalizer) -> None:
    assert before_folding(None, None) is None
    chained = before_folding(lambda query: f"[{query}]", normalizer)
    assert chained is not None
    assert chained("in hungary") == "[In Hungary]"
