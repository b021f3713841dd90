"""Token ids in a text's place, and reasoning that is read while it is written."""

from __future__ import annotations

import numpy as np
import pytest

from search_r3 import InputError, SearchR3
from search_r3.model.tokenization import CountedTexts, TextStream, Tokens, encode_as_text, special_ids

TEXTS = ["Paris is the capital.", "naïve 日本語 text with <|embed_token|> in it"]


def tokens(model: SearchR3) -> list[Tokens]:
    return [Tokens(tuple(ids)) for ids in encode_as_text(model.tokenizer, TEXTS)]


def test_a_text_as_tokens_is_embedded_as_the_text(tiny: SearchR3) -> None:
    mixed = [TEXTS[0], tokens(tiny)[1]]
    assert np.array_equal(tiny.encode_document(mixed), tiny.encode_document(TEXTS))
    assert np.array_equal(tiny.encode_query(tokens(tiny), reasoning=False), tiny.encode_query(TEXTS, reasoning=False))
    found, expected = tiny.reason(tokens(tiny), max_reasoning_tokens=5), tiny.reason(TEXTS, max_reasoning_tokens=5)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]


def test_special_and_unknown_tokens_are_refused(tiny: SearchR3) -> None:
    assert tiny.contract.embed_token_id in special_ids(tiny.tokenizer)
    for token in [*special_ids(tiny.tokenizer), -1, len(tiny.tokenizer)]:
        with pytest.raises(InputError, match=f"text 2 of 2 contains token {token};"):
            tiny.encode_document(["x", Tokens((5, token))])
    with pytest.raises(InputError, match="text 1 of 1 is empty"):
        tiny.encode_document([Tokens(())])


def test_every_token_is_told_in_order_while_it_is_written(tiny: SearchR3) -> None:
    reported: dict[int, list[int]] = {}
    texts = [*TEXTS, "x", "a much longer text than the others, so that it is first in its batch"]
    found = tiny.reason(
        texts,
        max_reasoning_tokens=9,
        batch_size=2,
        on_token=lambda row, token: reported.setdefault(row, []).append(token),
    )
    assert [reported.get(row, []) for row in range(len(texts))] == [r.reasoning_ids for r in found]
    samples: dict[int, list[int]] = {}
    found = tiny.reason(
        texts, max_reasoning_tokens=4, temperature=1.0, samples=3, batch_size=6,
        on_token=lambda row, token: samples.setdefault(row, []).append(token),
    )  # fmt: skip
    assert [samples.get(row, []) for row in range(len(found))] == [r.reasoning_ids for r in found]


def test_what_the_listener_raises_ends_the_writing(tiny: SearchR3) -> None:
    def stop(row: int, token: int) -> None:
        raise KeyError(token)

    with pytest.raises(KeyError):
        tiny.reason(TEXTS, max_reasoning_tokens=9, on_token=stop)


@pytest.mark.parametrize("text", ["  two  words \n\n", "日本語 é 👩‍💻!", "\ufffd x \ufffd", " ", "", "a."])
def test_the_pieces_put_together_are_the_text(tiny: SearchR3, text: str) -> None:
    stream = TextStream(tiny.tokenizer)
    ids = encode_as_text(tiny.tokenizer, [text])[0] if text else []
    pieces = [stream.push(token) for token in ids]
    assert "".join([*pieces, stream.finish()]) == tiny.tokenizer.decode(ids).strip() == text.strip()
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_counted_texts_are_not_tokenized_again(tiny: SearchR3, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*TEXTS, TEXTS[0], "counted by nobody", "LOUD WORDS"]
    expected = tiny.tokenize_documents(texts, 4)
    lengths = [len(text.ids) for text in tiny.tokenize_documents(TEXTS, 512)[0]]
    assert tiny.count_tokens([*texts[:2], " "]) == [*lengths, 1]
    given: list[list[str]] = []
    real = tiny.token_rows
    monkeypatch.setattr(tiny, "token_rows", lambda some, limit: given.append(some) or real(some, limit))
    tiny.count_tokens(TEXTS)
    assert tiny.tokenize_documents(texts, 4) == expected
    assert tiny.tokenize_documents(texts, 4) == expected  # forgotten once they were used
    assert given == [texts[3:], texts]
    with pytest.raises(InputError, match="text 3 of 3 is empty"):
        tiny.tokenize_documents([*TEXTS, " "], 4)


def test_counted_texts_are_forgotten_from_the_oldest_on(tiny: SearchR3) -> None:
    counted = CountedTexts(tiny.tokenizer, most=2)
    assert counted.count(["a", "b", "c", " "]) == [1, 1, 1, 1]
    assert list(counted.take(["a", "b", "c", " "])) == ["b", "c"]
    assert counted.count([]) == []
