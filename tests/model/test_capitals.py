"""Texts all in capitals: which are folded, and that every way into the model folds them or none does."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from search_r3 import SearchR3
from search_r3.index.build.embedding import embed, prepare
from search_r3.model.capitals import capitals_note, fold_capitals
from search_r3.model.concurrent_reasoning import ConcurrentReasoning
from search_r3.model.text_limit import TextLimit, read_texts
from search_r3.model.tokenization import Tokens, WholeTokens, encode_as_text
from search_r3.training.grpo.rollout_engines import query_rows

SHOUTED = "HOW DO I READ A FILE LINE BY LINE IN PYTHON? OPEN IT."
ORDINARY = "How do i read a file line by line in python? Open it."


@pytest.fixture
def folding(tiny_model: Path) -> SearchR3:
    model = SearchR3.from_pretrained(tiny_model, device="cpu")
    model.contract = replace(model.contract, fold_capitals=True)
    model.checkpoint = replace(model.checkpoint, contract=model.contract)
    return model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SHOUTED, ORDINARY),
        ("CAPITAL OF FRANCE", "Capital of france"),
        ("KUBERNETES", "Kubernetes"),
        ("VITAMIN B12 AND COVID-19: A REVIEW.\nMETHODS", "Vitamin B12 and COVID-19: a review.\nMethods"),
        ("WHAT DOES THE VARIABLE MAX_LENGTH DO?", "What does the variable MAX_LENGTH do?"),
        ('"WHO ASKED?" SHE ASKED  HIM', '"Who asked?" She asked  him'),
        ("WAS IST DIE HAUPTSTADT VON ÖSTERREICH", "Was ist die hauptstadt von österreich"),
        ("КАКАЯ СТОЛИЦА ФРАНЦИИ", "Какая столица франции"),
        ("ΠΟΙΑ ΕΙΝΑΙ Η ΠΡΩΤΕΥΟΥΣΑ ΤΗΣ ΓΑΛΛΙΑΣ", "Ποια ειναι η πρωτευουσα της γαλλιας"),
    ],
)
def test_prose_in_capitals_gets_sentence_case(text: str, expected: str) -> None:
    assert fold_capitals(text) == expected
    assert fold_capitals(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "What does NASA do?",
        "what is the WHO",
        "NASA",
        "WHO",
        "NASA ESA JAXA",
        "U.S.A. GDP",
        "MAX_CHARACTERS",
        "CUDA_VISIBLE_DEVICES=0,1 PYTORCH_CUDA_ALLOC_CONF=1",
        "X = 3",
        "INTRODUCTION AND OVERVIEW OF METHODS\nThe body is ordinary text.",
        "什么是NASA",
        "世界贸易组织 WTO 国际货币基金组织 IMF 国内生产总值 GDP 世界卫生组织 WHO",
        "ما هي عاصمة فرنسا WHO",
        "日本の首都はどこですか",
        "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ ᎠᏂᏴᏫᏯ ᎢᏳᎾᏍᏗ",
        "",
        "12345 !?",
        "   ",
    ],
)
def test_acronyms_names_headings_and_scripts_without_case_stay(text: str) -> None:
    assert fold_capitals(text) is text


@pytest.mark.parametrize(
    "text", [SHOUTED * 100_000, "A" * 5_000_000, "A " * 2_000_000 + "b", ". " * 2_000_000 + "A" * 9]
)
def test_a_long_text_takes_a_time_that_grows_with_its_length_only(text: str) -> None:
    started = time.process_time()
    fold_capitals(text)
    assert time.process_time() - started < 20


def test_every_way_into_a_model_that_folds_gives_the_ids_of_the_ordinary_text(folding: SearchR3) -> None:
    (wanted,) = encode_as_text(folding.tokenizer, [ORDINARY])
    assert folding.tokenize_documents([SHOUTED], 512) == ([Tokens(tuple(wanted))], [len(wanted)])
    assert read_texts(folding, [SHOUTED], TextLimit(512)).rows == [WholeTokens(tuple(wanted))]
    assert query_rows(folding, [SHOUTED], 512)[0][: len(wanted)] == wanted
    joined: list[list[int]] = []
    writing = ConcurrentReasoning(folding)
    writing._slots = SimpleNamespace(join=lambda rows, budgets: joined.extend(rows) or [0])
    writing.join([SHOUTED], [4])
    assert joined[0][: len(wanted)] == wanted
    for encode in (
        folding.encode_document,
        lambda texts: folding.encode_query(texts, reasoning=False),
        lambda texts: folding.encode_query(texts, reasoning=True, max_reasoning_tokens=4),
        lambda texts: folding.encode_with_reasoning(texts, ["files"] * len(texts)),
        lambda texts: embed(folding, prepare(folding, texts, None, 512, None), ["a"], None),
    ):
        shouted, ordinary = encode([SHOUTED]), encode([ORDINARY])
        assert np.array_equal(shouted, ordinary)


def test_reasoning_that_is_given_is_never_folded(folding: SearchR3, tiny: SearchR3) -> None:
    trace = ["FILES ARE READ LINE BY LINE"]
    folded = folding.encode_with_reasoning([ORDINARY], trace)
    assert np.array_equal(folded, tiny.encode_with_reasoning([ORDINARY], trace))


def test_a_contract_of_today_folds_nothing(tiny: SearchR3) -> None:
    assert not tiny.contract.fold_capitals
    assert tiny.token_rows([SHOUTED]) == encode_as_text(tiny.tokenizer, [SHOUTED])
    assert not np.array_equal(tiny.encode_document([SHOUTED]), tiny.encode_document([ORDINARY]))
    assert capitals_note(tiny) == []


def test_it_is_saved_with_the_model_and_makes_another_space(folding: SearchR3, tiny: SearchR3, tmp_path: Path) -> None:
    folding.save_pretrained(tmp_path / "saved")
    loaded = SearchR3.from_pretrained(tmp_path / "saved", device="cpu")
    assert loaded.contract.fold_capitals
    assert loaded.contract_hash != tiny.contract_hash
    assert np.array_equal(loaded.encode_document([SHOUTED]), loaded.encode_document([ORDINARY]))
