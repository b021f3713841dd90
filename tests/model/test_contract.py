"""The embedding contract tells two spaces apart, and records of older formats keep their hash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search_r3.errors import InputError
from search_r3.model import contract
from search_r3.model.checkpoint import read_record
from search_r3.model.contract import Contract
from search_r3.prompts import Conversation, Prompts, latent_conversation

CONTRACT = Contract("name", "b" * 64, "a" * 64, 400, 32)


class TestContract:
    @pytest.mark.parametrize(
        "change",
        [
            {"base_weights": "c" * 64},
            {"adapter_weights": "c" * 64},
            {"embed_token_id": 401},
            {"dimension": 64},
            {"chat_template": "other"},
            {"pooling": "mean"},
            {"fold_capitals": True},
            {"prompts": Prompts(query=Conversation("Please represent a user's queries.", "The embedding is "))},
            {"prompts": Prompts(latent=latent_conversation(3))},
            {"query_weights": "c" * 64},
        ],
    )
    def test_the_hash_changes_with_whatever_moves_an_embedding(self, change: dict[str, Any]) -> None:
        assert replace(CONTRACT, **change).hash != CONTRACT.hash

    def test_the_hash_does_not_change_with_the_display_name(self) -> None:
        assert replace(CONTRACT, base="another name").hash == CONTRACT.hash

    @pytest.mark.parametrize(
        ("change", "other"),
        [
            ({"base_weights": "c" * 64}, True),
            ({"adapter_weights": "c" * 64}, True),
            ({"embed_token_id": 401}, True),
            ({"dimension": 64}, True),
            ({"chat_template": "other"}, True),
            ({"pooling": "mean"}, True),
            ({"fold_capitals": True}, True),
            ({"prompts": Prompts(document=Conversation("Please represent a text.", "The embedding is "))}, True),
            (
                {"prompts": Prompts(query=Conversation("Please represent a user's queries.", "The embedding is "))},
                False,
            ),
            ({"prompts": Prompts(latent=latent_conversation(3))}, False),
            ({"query_weights": "c" * 64}, False),
            ({"base": "another name"}, False),
        ],
    )
    def test_the_document_space_changes_with_what_moves_a_document_and_with_nothing_else(
        self, change: dict[str, Any], other: bool
    ) -> None:
        assert (replace(CONTRACT, **change).document_space != CONTRACT.document_space) == other

    @pytest.mark.parametrize(
        "given", [CONTRACT, replace(CONTRACT, fold_capitals=True), replace(CONTRACT, query_weights="q" * 64)]
    )
    def test_it_comes_back_from_json_the_same(self, given: Contract) -> None:
        record = json.loads(json.dumps(given.to_dict()))
        assert Contract.from_dict(record, "here") == given

    def test_one_that_does_not_fold_capitals_is_written_as_before_and_one_that_does_says_that_it_is_newer(self) -> None:
        assert CONTRACT.to_dict()["format"] == 1
        assert "fold_capitals" not in CONTRACT.to_dict()
        assert replace(CONTRACT, fold_capitals=True).to_dict()["format"] == 2
        assert "query_weights" not in CONTRACT.to_dict()
        assert replace(CONTRACT, query_weights="q" * 64).to_dict()["format"] == 3

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": 99}, "newer Search-R3"),
            ({"embed_token": "<other>"}, "the embed token must be"),
            ({"fold_capitals": "yes"}, "fold_capitals is 'yes', not true or false"),
            ({"surprise": 1}, "is not an embedding contract"),
            ({"prompts": {"query": {}}}, "prompts must have document, query, reasoning"),
        ],
    )
    def test_a_malformed_record_is_refused_with_the_place(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Contract.from_dict(CONTRACT.to_dict() | change, "here.json")


class TestFormats:
    def test_the_contract_that_is_shipped_loads_unchanged_and_keeps_its_hash(self) -> None:
        folder = Path(__file__).resolve().parents[2] / "models" / "search-r3-smollm2-135m-sft"
        record = read_record(folder)
        assert record is not None
        assert record["contract"]["format"] == 1
        found = Contract.from_dict(record["contract"], "here")
        assert found.hash == record["contract_hash"]
        assert contract.migrate(record["contract"], "here") | {"format": 1} == record["contract"]
        assert found.prompts.latent is None

    def test_a_record_without_a_format_is_brought_to_this_one_and_is_the_same_contract(self) -> None:
        old = CONTRACT.to_dict()
        for name in ("format", "pooling", "chat_template"):
            del old[name]
        before = dict(old)
        assert Contract.from_dict(old, "here") == CONTRACT
        assert Contract.from_dict(old, "here").hash == CONTRACT.hash
        assert old == before

    def test_every_older_format_has_its_step_and_a_later_format_keeps_the_hash(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert sorted(contract._STEPS) == list(range(contract.FORMAT))
        newest = contract.FORMAT
        monkeypatch.setattr(contract, "FORMAT", newest + 1)
        monkeypatch.setitem(contract._STEPS, newest, lambda record: record)
        found = Contract.from_dict(CONTRACT.to_dict(), "here")
        assert found.format == newest + 1
        assert found.hash == CONTRACT.hash

    @pytest.mark.parametrize(("format", "message"), [(6, r"here .* newer .*reads up to 5.*upgrade"), (-1, "damaged")])
    def test_a_format_that_is_not_known_is_refused_in_a_line(self, format: int, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Contract.from_dict(CONTRACT.to_dict() | {"format": format}, "here")
