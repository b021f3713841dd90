"""How much of a text is read, and what happens to a longer one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.model.text_limit import (
    LimitedQueries,
    TextLimit,
    TextTooLong,
    check_room,
    longest_text,
    mean_of_parts,
    read_texts,
)
from search_r3.model.tokenization import MAX_CHARACTERS, Tokens, WholeTokens, encode_as_text

LONG = "How do I read a file line by line in Python? Open it and iterate over the lines."
SHORT = "lines"


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> SearchR3:
    return SearchR3.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def ids(tiny: SearchR3) -> list[int]:
    return encode_as_text(tiny.tokenizer, [LONG])[0]


def test_a_text_within_the_limit_is_read_whole_whatever_the_policy(tiny: SearchR3, ids: list[int]) -> None:
    for too_long in ("error", "truncate", "split"):
        read = read_texts(tiny, [LONG, Tokens(tuple(ids))], TextLimit(len(ids), too_long))
        assert [list(row.ids) for row in read.rows] == [ids, ids]
        assert (read.parts, read.truncated, read.split, read.tokens) == ([1, 1], 0, 0, 2 * len(ids))


@pytest.mark.parametrize("given", ["text", "ids"])
def test_a_longer_text_is_truncated_from_the_chosen_side(tiny: SearchR3, ids: list[int], given: str) -> None:
    texts = [SHORT, LONG if given == "text" else Tokens(tuple(ids))]
    for side, kept in (("right", ids[:5]), ("left", ids[-5:])):
        read = read_texts(tiny, texts, TextLimit(5, "truncate", side))
        assert list(read.rows[1].ids) == kept
        assert (read.truncated, read.tokens) == (1, len(read.rows[0].ids) + 5)


def test_a_longer_text_is_refused_by_its_number(tiny: SearchR3) -> None:
    with pytest.raises(TextTooLong, match=r"text 2 of 2 has over 5 tokens, the limit; shorten it, or set too_long"):
        read_texts(tiny, [SHORT, LONG], TextLimit(5, "error"))
    with pytest.raises(TextTooLong, match=r"^the text has over 5 tokens"):
        read_texts(tiny, [LONG], TextLimit(5, "error"))


def test_a_longer_document_is_split_into_equal_parts(tiny: SearchR3, ids: list[int]) -> None:
    for limit in (1, 5, len(ids) - 1):
        read = read_texts(tiny, [SHORT, LONG], TextLimit(limit, "split"))
        parts = [list(row.ids) for row in read.rows[-read.parts[1] :]]
        assert [token for part in parts for token in part] == ids
        assert max(map(len, parts)) <= limit
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert len(parts) == read.parts[1] == -(-len(ids) // limit)
        assert read.truncated == 0


def test_counting_sees_what_is_read_and_can_end_the_call(tiny: SearchR3, ids: list[int]) -> None:
    seen: list[int] = []
    read_texts(tiny, [LONG, LONG], TextLimit(5), seen.append)
    assert seen[-1] == 10
    read_texts(tiny, [LONG, LONG], TextLimit(5, "split"), seen.append)
    assert seen[-1] == 2 * len(ids)

    def refuse(tokens: int) -> None:
        if tokens > 20:
            raise RuntimeError(str(tokens))

    with pytest.raises(RuntimeError, match=r"^21$"):  # no text is tokenized further than that
        read_texts(tiny, [LONG * 1000], TextLimit(5, "split"), refuse, most=20)


def test_the_last_tokens_of_a_huge_text_are_not_looked_for(tiny: SearchR3) -> None:
    with pytest.raises(TextTooLong, match="truncate it from the right"):
        read_texts(tiny, ["a " * MAX_CHARACTERS], TextLimit(5, "truncate", "left"))


def test_whole_tokens_are_read_beyond_the_models_own_limit(tiny: SearchR3) -> None:
    long = LONG * 20
    ids = encode_as_text(tiny.tokenizer, [long])[0][:600]
    whole = tiny.encode_document([WholeTokens(tuple(ids))])
    np.testing.assert_allclose(whole, tiny.encode_document([Tokens(tuple(ids))], max_length=600), atol=2e-6)
    assert not np.allclose(whole, tiny.encode_document([Tokens(tuple(ids))]), atol=1e-3)
    query = tiny.encode_query([WholeTokens(tuple(ids))], reasoning=False)
    assert not np.allclose(query, tiny.encode_query([Tokens(tuple(ids))], reasoning=False), atol=1e-3)


def test_the_mean_of_parts_is_weighted_by_their_tokens() -> None:
    a, b = np.array([1.0, 0.0], dtype=np.float32), np.array([0.0, 1.0], dtype=np.float32)
    mean = mean_of_parts(np.stack([a, b]), [3, 4])
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, [0.6, 0.8], atol=1e-6)


def test_there_is_room_for_what_the_context_leaves_beside_prompt_and_reasoning(tiny: SearchR3) -> None:
    context = tiny.checkpoint.model.config.max_position_embeddings
    prompt = max(len(one.prefix) + len(one.suffix) for one in tiny.templates.values())
    assert longest_text(tiny) == context - prompt - 1
    assert longest_text(tiny, 100) == context - prompt - 101
    check_room(tiny, context - prompt - 1)
    with pytest.raises(InputError, match=rf"--max-tokens is {context:,}, but the context of .* has room for"):
        check_room(tiny, context, name="--max-tokens")


@pytest.mark.parametrize("reasoning", [False, True])
def test_limited_queries_are_the_models_own_of_their_first_tokens(
    tiny: SearchR3, ids: list[int], reasoning: bool
) -> None:
    limited = LimitedQueries(tiny, TextLimit(5))
    options = {"reasoning": reasoning, "max_reasoning_tokens": 3}
    expected = tiny.encode_query([Tokens(tuple(ids[:5]))], **options)
    np.testing.assert_allclose(limited.encode_query([LONG], **options), expected, atol=2e-6)
    assert (limited.tokens, limited.truncated) == (5, True)
    reasoned = limited.reason([SHORT], max_reasoning_tokens=3)[0]
    np.testing.assert_allclose(reasoned.embedding, tiny.reason([SHORT], max_reasoning_tokens=3)[0].embedding, atol=2e-6)
    assert not limited.truncated
    given = limited.encode_with_reasoning([LONG], ["words"])
    np.testing.assert_allclose(given, tiny.encode_with_reasoning([Tokens(tuple(ids[:5]))], ["words"]), atol=2e-6)
    assert limited.dimension == tiny.dimension
    with pytest.raises(TextTooLong):
        LimitedQueries(tiny, TextLimit(5, "error")).encode_query([LONG], reasoning=False)
