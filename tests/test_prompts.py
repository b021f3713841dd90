"""The conversations: what is hashed, what is rendered, what a base model must bring."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search_r3.errors import InputError
from search_r3.model.checkpoint import add_embed_token
from search_r3.prompts import (
    EMBED_TOKEN,
    Conversation,
    Prompts,
    latent_conversation,
    reading_conversation,
    render,
    templates_of,
    with_reading,
)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tiny_model)
    add_embed_token(loaded)
    return loaded


def test_a_given_answer_ends_with_the_embed_token(tokenizer: Any) -> None:
    template = render(Prompts().document, tokenizer, give_answer=True)
    assert template.suffix[-1] == tokenizer.convert_tokens_to_ids(EMBED_TOKEN)
    whole = tokenizer.decode([*template.prefix, *tokenizer.encode("TEXT", add_special_tokens=False), *template.suffix])
    assert whole == (
        "<|im_start|>system\nPlease represent documents.<|im_end|>\n<|im_start|>user\nTEXT<|im_end|>\n"
        "<|im_start|>assistant\nThe embedding is<|embed_token|>"
    )


def test_a_reasoning_frame_stops_where_the_assistant_begins(tokenizer: Any) -> None:
    template = render(Prompts().reasoning, tokenizer, give_answer=False)
    assert tokenizer.convert_tokens_to_ids(EMBED_TOKEN) not in template.prefix + template.suffix
    assert tokenizer.decode(template.suffix) == "<|im_end|>\n<|im_start|>assistant\n"


def test_a_blank_before_the_embed_token_belongs_to_it(tokenizer: Any) -> None:
    with_blank = tokenizer.encode(f"is {EMBED_TOKEN}", add_special_tokens=False)
    assert with_blank == tokenizer.encode(f"is{EMBED_TOKEN}", add_special_tokens=False)


def test_the_three_conversations_differ() -> None:
    prompts = Prompts()
    assert len({prompts.document.system, prompts.query.system, prompts.reasoning.system}) == 3


def test_prompts_come_back_from_a_dictionary_the_same() -> None:
    prompts = replace(Prompts(), query=Conversation("Represent.", "It is "))
    assert Prompts.from_dict(prompts.to_dict()) == prompts


@pytest.mark.parametrize("broken", [{}, {"query": {"system": "x"}}, {"document": 1, "query": 1, "reasoning": 1}])
def test_broken_prompts_are_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="prompts must have document, query, reasoning"):
        Prompts.from_dict(broken)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('System role not supported') }}", "refuses our conversation: System role not supported"),
        ("{{ messages[0]['content'] }}", "must show the user's text once"),
        ("{{ messages[1]['content'] | lower }}", "must show the user's text once"),
        ("{{ messages[1]['content'] }}{{ messages[1]['content'] }}", "must show the user's text once"),
    ],
)
def test_a_base_whose_template_cannot_hold_our_conversation_is_refused(
    tokenizer: Any, template: str | None, message: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=message):
        render(Prompts().query, tokenizer, give_answer=True)


def test_latent_steps_begin_where_the_direct_conversation_has_the_embed_token(tokenizer: Any) -> None:
    template = render(latent_conversation(3), tokenizer, give_answer=True, embed_token=False)
    direct = render(Prompts().query, tokenizer, give_answer=True)
    assert template.suffix == direct.suffix[:-1]
    assert tokenizer.decode(template.suffix) == "<|im_end|>\n<|im_start|>assistant\nThe embedding is"
    assert template.prefix != direct.prefix


def test_prompts_without_a_latent_conversation_are_written_as_before_there_was_one() -> None:
    assert list(Prompts().to_dict()) == ["document", "query", "reasoning"]
    with_latent = replace(Prompts(), latent=latent_conversation(2))
    assert with_latent.to_dict()["latent"]["steps"] == 2
    assert Prompts.from_dict(with_latent.to_dict()) == with_latent
    assert Prompts.from_dict(Prompts().to_dict()) == Prompts()


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps": "3"}, {"steps": True}, {"system": 1}, {"more": ""}])
def test_a_malformed_latent_conversation_is_refused(change: dict[str, Any]) -> None:
    record = replace(Prompts(), latent=latent_conversation(2)).to_dict()
    record["latent"] |= change
    with pytest.raises(InputError, match="the checkpoint's prompts must have document, query, reasoning"):
        Prompts.from_dict(record)


def test_prompts_without_a_reading_conversation_are_written_as_before_there_was_one(tokenizer: Any) -> None:
    reads = with_reading(Prompts(), 3, 20)
    assert reads.to_dict()["reading"] | {"system": ""} == {
        "system": "", "answer": "The embedding is ", "passages": 3, "passage_tokens": 20, "marker": "\n\n[#]\n"
    }  # fmt: skip
    assert Prompts.from_dict(reads.to_dict()) == reads
    assert with_reading(reads, 0, 20) == Prompts()
    assert list(templates_of(Prompts(), tokenizer)) == ["document", "query", "reasoning"]
    assert templates_of(reads, tokenizer)["reading"].suffix == templates_of(reads, tokenizer)["query"].suffix


def test_a_conversation_that_reads_as_much_is_kept_as_it_is() -> None:
    own = replace(Prompts(), reading=replace(reading_conversation(), system="Read."))
    assert with_reading(own, 4, 48) is own
    assert with_reading(own, 5, 48).reading == reading_conversation(5)


def test_a_passage_is_marked_with_its_number() -> None:
    assert [reading_conversation().marker_of(number) for number in (1, 10)] == ["\n\n[1]\n", "\n\n[10]\n"]


@pytest.mark.parametrize("change", [{"passages": 0}, {"passage_tokens": "48"}, {"marker": 1}, {"answer": None}])
def test_a_malformed_reading_conversation_is_refused(change: dict[str, Any]) -> None:
    record = replace(Prompts(), reading=reading_conversation()).to_dict()
    record["reading"] |= change
    with pytest.raises(InputError, match="the checkpoint's prompts must have document, query, reasoning"):
        Prompts.from_dict(record)
