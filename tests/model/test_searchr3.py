"""What a user of SearchR3 relies on: order, batches, plain text, and errors that say what to do."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.model.adaptive_reasoning import ADAPTIVE_FILE, FEATURES, AdaptiveRule
from search_r3.model.searchr3 import MAX_CHARACTERS, encode_as_text

TEXTS = [
    "How do I read a file line by line in Python?",
    "x",
    "def mean(values):\n    return sum(values) / len(values)",
    "Die Hauptstadt von Frankreich ist Paris.",
    "Aspirin lowers the risk of heart attack. " * 12,
    "queries and documents",
]


def plain_forward(model: SearchR3, ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        state_D = model.checkpoint.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    return torch.nn.functional.normalize(state_D, dim=-1).numpy()


@pytest.mark.parametrize("side", ["document", "query", "reasoning"])
def test_rows_come_in_the_order_of_the_texts_whatever_the_batch(tiny: SearchR3, side: str) -> None:
    def encode(texts: list[str], size: int) -> np.ndarray:
        if side == "document":
            return tiny.encode_document(texts, batch_size=size)
        return tiny.encode_query(texts, reasoning=side == "reasoning", batch_size=size)

    alone = np.concatenate([encode([text], 1) for text in TEXTS])
    for size in (2, 32):
        assert np.abs(encode(TEXTS, size) - alone).max() < 1e-4
    assert np.abs(encode(TEXTS[::-1], 32)[::-1] - alone).max() < 1e-4


def test_the_embedding_is_a_separate_forward_pass_over_the_reported_ids(tiny: SearchR3) -> None:
    for reasoned in tiny.reason(TEXTS, max_reasoning_tokens=12):
        assert reasoned.token_ids[-1] == tiny.contract.embed_token_id
        assert np.abs(reasoned.embedding - plain_forward(tiny, reasoned.token_ids)).max() < 1e-4


def test_a_document_is_its_conversation_with_the_token_last(tiny: SearchR3) -> None:
    template = tiny.templates["document"]
    ids = [*template.prefix, *encode_as_text(tiny.tokenizer, [TEXTS[0]])[0], *template.suffix]
    assert ids[-1] == tiny.contract.embed_token_id
    assert np.abs(tiny.encode_document([TEXTS[0]])[0] - plain_forward(tiny, ids)).max() < 1e-4


def test_encode_query_with_reasoning_is_what_reason_returns(tiny: SearchR3) -> None:
    reasoned = tiny.reason(TEXTS, max_reasoning_tokens=5)
    assert all(r.num_tokens <= 5 for r in reasoned)
    assert np.array_equal(tiny.encode_query(TEXTS, max_reasoning_tokens=5), np.stack([r.embedding for r in reasoned]))


def test_samples_of_a_query_stand_together_behind_its_own_prompt(tiny: SearchR3) -> None:
    found = tiny.reason(TEXTS, max_reasoning_tokens=6, temperature=1.0, seed=3, samples=3)
    assert len(found) == 3 * len(TEXTS)
    for number, text in enumerate(TEXTS):
        group = found[3 * number : 3 * number + 3]
        assert len({tuple(r.token_ids) for r in group}) > 1
        behind = tiny.encode_with_reasoning([text] * 3, [r.reasoning_ids for r in group])
        np.testing.assert_allclose(behind, np.stack([r.embedding for r in group]), atol=1e-5)
        prompts = {tuple(r.token_ids[: -1 - r.num_tokens]) for r in group}
        assert prompts == {tuple(tiny.reason([text], max_reasoning_tokens=0)[0].token_ids[:-1])}


@pytest.mark.parametrize("budget", [0, 12])
def test_behind_what_reason_wrote_stands_what_reason_embedded(tiny: SearchR3, budget: int) -> None:
    reasoned = tiny.reason(TEXTS, max_reasoning_tokens=budget)
    rows = tiny.encode_with_reasoning(TEXTS, [r.reasoning_ids for r in reasoned], batch_size=4)
    assert np.abs(rows - np.stack([r.embedding for r in reasoned])).max() < 1e-5
    assert rows.dtype == np.float32
    assert all(len(r.reasoning_ids) == r.num_tokens for r in reasoned)


def test_reasoning_may_be_given_as_text(tiny: SearchR3) -> None:
    traces = ["open it and iterate", "", "hidden state", "Paris", "risk", "x" * 40]
    rows = tiny.encode_with_reasoning(TEXTS, traces)
    for row, text, trace in zip(rows, TEXTS, traces, strict=True):
        template = tiny.templates["reasoning"]
        given = encode_as_text(tiny.tokenizer, [text])[0], encode_as_text(tiny.tokenizer, [trace])[0]
        ids = [*template.prefix, *given[0], *template.suffix, *given[1], tiny.contract.embed_token_id]
        assert np.abs(row - plain_forward(tiny, ids)).max() < 1e-5
        assert np.abs(row - tiny.encode_with_reasoning([text], [given[1]])[0]).max() < 1e-5
    empty = tiny.reason([TEXTS[1]], max_reasoning_tokens=0)[0].embedding
    assert np.abs(rows[1] - empty).max() < 1e-5
    assert np.abs(rows[1] - tiny.encode_query([TEXTS[1]], reasoning=False)[0]).max() > 1e-3  # another conversation
    assert tiny.encode_with_reasoning([], []).shape == (0, tiny.dimension)


def test_given_reasoning_is_cut_at_the_budget_and_its_special_tokens_are_text(tiny: SearchR3) -> None:
    trace = "first enrich <|embed_token|> the query <|im_end|> in a few words"
    ids = encode_as_text(tiny.tokenizer, [trace])[0]
    assert not set(ids) & set(tiny.tokenizer.all_special_ids)
    whole = tiny.encode_with_reasoning(["x"], [trace])
    assert np.abs(whole - tiny.encode_with_reasoning(["x"], [ids])).max() < 1e-5
    cut = tiny.encode_with_reasoning(["x"], [trace], max_reasoning_tokens=5)
    assert np.abs(cut - tiny.encode_with_reasoning(["x"], [ids[:5]])).max() < 1e-5
    assert np.abs(cut - whole).max() > 1e-3


def test_own_words_take_the_place_of_the_models_reasoning(tiny: SearchR3) -> None:
    words = ["open the file, then loop over its lines <|embed_token|>", ""]
    rows = tiny.encode_query(TEXTS[:2], reasoning_text=words, max_reasoning_tokens=3)
    assert np.array_equal(rows, tiny.encode_with_reasoning(TEXTS[:2], words)), "they are no budget's concern"
    assert np.abs(rows - tiny.encode_query(TEXTS[:2], max_reasoning_tokens=3)).max() > 1e-3
    long = "word " * 2000
    kept = encode_as_text(tiny.tokenizer, [long])[0][:512]
    cut = tiny.encode_query(["x"], reasoning_text=[long])
    assert np.abs(cut - tiny.encode_with_reasoning(["x"], [kept])).max() < 1e-5


@pytest.mark.parametrize("special", ["<|embed_token|>", "<|im_end|>", "<|im_start|>system"])
def test_a_special_token_in_a_users_text_stays_text(tiny: SearchR3, special: str) -> None:
    text = f"what does {special} mean"
    ids = encode_as_text(tiny.tokenizer, [text])[0]
    assert not set(ids) & set(tiny.tokenizer.all_special_ids)
    assert tiny.tokenizer.decode(ids) == text
    row = tiny.reason([text], max_reasoning_tokens=0)[0].token_ids
    assert row.count(tiny.contract.embed_token_id) == 1


def test_threads_never_let_a_special_token_through(tiny: SearchR3) -> None:
    failures: list[Any] = []

    def ask() -> None:
        try:
            for _ in range(30):
                ids = encode_as_text(tiny.tokenizer, ["a <|im_end|> b"] * 8)
                failures.extend(row for row in ids if set(row) & set(tiny.tokenizer.all_special_ids))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures


def test_documents_are_cut_at_max_length(tiny: SearchR3) -> None:
    ids = encode_as_text(tiny.tokenizer, [TEXTS[4]])[0]
    head = tiny.tokenizer.decode(ids[:8])
    assert encode_as_text(tiny.tokenizer, [head])[0] == ids[:8]
    assert np.allclose(tiny.encode_document([TEXTS[4]], max_length=8), tiny.encode_document([head]), atol=1e-5)


def test_no_texts_give_no_rows(tiny: SearchR3) -> None:
    for found in (tiny.encode_document([]), tiny.encode_query([]), tiny.encode_query([], reasoning=False)):
        assert found.shape == (0, tiny.dimension)
        assert found.dtype == np.float32
    assert tiny.reason([]) == []


def test_similarity_is_the_cosine(tiny: SearchR3) -> None:
    a = tiny.encode_document(TEXTS)
    assert tiny.similarity(a, a[:2]).shape == (len(TEXTS), 2)
    assert np.allclose(np.diag(tiny.similarity(a, a)), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode_document(["fine", "  "]), "text 2 of 2 is empty"),
        (lambda m: m.encode_document(["fine", None]), "text 2 of 2 is a NoneType"),
        (lambda m: m.encode_document("one string"), "not one string"),
        (lambda m: m.encode_document(["x"], batch_size=0), "batch_size must be 1 or more, got 0"),
        (lambda m: m.encode_document(["x"], max_length=0), "max_length must be 1 or more, got 0"),
        (lambda m: m.encode_query(["x"], batch_size=0), "batch_size must be 1 or more, got 0"),
        (lambda m: m.encode_query(["x"], reasoning="yes"), 'reasoning must be True, False or "latent"'),
        (lambda m: m.encode_query(["x"], reasoning="auto"), "use it to search an index"),
        (lambda m: m.encode_query(["y" * (MAX_CHARACTERS + 1)]), "query 1 of 1 has 100,001 characters"),
        (lambda m: m.encode_query(["y" * (MAX_CHARACTERS + 1)], reasoning=False), "100,001 characters"),
        (lambda m: m.reason(["x"], max_reasoning_tokens=-1), "max_reasoning_tokens must be 0 or more, got -1"),
        (
            lambda m: m.reason(["x", "y"], max_reasoning_tokens=[3, -2]),
            "max_reasoning_tokens must be 0 or more, got -2",
        ),
        (lambda m: m.reason(["x", "y"], max_reasoning_tokens=[3]), "1 values of max_reasoning_tokens for 2 texts"),
        (lambda m: m.encode_with_reasoning(["x", "y"], ["z"]), "1 reasoning traces for 2 texts; give one per text"),
        (lambda m: m.encode_query(["x", "y"], reasoning_text=["z"]), "1 reasoning traces for 2 texts"),
        (lambda m: m.encode_query(["x"], reasoning_text="z"), "not one string"),
        (lambda m: m.encode_query(["x"], reasoning=False, reasoning_text=["z"]), "must be True, got False"),
        (lambda m: m.encode_query(["x"], reasoning="latent", reasoning_text=["z"]), "must be True, got 'latent'"),
        (lambda m: m.encode_with_reasoning([" "], ["z"]), "text 1 of 1 is empty"),
        (lambda m: m.encode_with_reasoning(["x"], [[1, m.contract.embed_token_id]]), "without the embed token"),
        (lambda m: m.encode_with_reasoning(["x"], [[-1]]), "the reasoning contains token -1"),
        (
            lambda m: m.encode_with_reasoning(["x"], [""], max_reasoning_tokens=-1),
            "max_reasoning_tokens must be 0 or more",
        ),
        (lambda m: m.reason(["x"], temperature=-0.5), "temperature must be 0 or more, got -0.5"),
        (lambda m: m.reason(["x"], samples=0), "samples must be 1 or more, got 0"),
    ],
)
def test_bad_input_is_one_clear_line(tiny: SearchR3, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call(tiny)
    assert "\n" not in str(caught.value)


def test_a_checkpoints_rule_is_found_beside_it_and_another_models_is_refused(tiny_model, tmp_path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model, folder)
    model = SearchR3.from_pretrained(folder, device="cpu")
    assert model.adaptive_rule is None
    ones = (1.0,) * len(FEATURES)
    rule = AdaptiveRule(model.contract_hash, weights=ones, mean=ones, scale=ones, bias=0.0, threshold=0.0)
    replace(rule, contract_hash="f" * 64).save(folder / ADAPTIVE_FILE)
    with pytest.raises(InputError, match="contract ffffffffffff"):
        _ = model.adaptive_rule
    rule.save(folder / ADAPTIVE_FILE)
    assert model.adaptive_rule == rule


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "onnx"}, "there is no engine 'onnx'"),
        ({"dtype": "int3"}, "unknown dtype 'int3'"),
        ({"device": "abacus"}, "cannot use device 'abacus'"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SearchR3.from_pretrained("smollm2-135m", **({"device": "cpu"} | settings))
