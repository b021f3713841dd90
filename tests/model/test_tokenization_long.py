"""The first tokens of a long text are those of the whole text, whatever stands where it is cut."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nightly import now
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.model.tokenization import Tokens, encode_as_text, token_rows

LIMIT = 16
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FROM_THE_RIGHT = r"\d{1,3}(?=(?:\d{3})*(?!\d))"
"""Groups of three digits, counted from the right: the first depends on where the number ends."""
SAMPLE = [
    "How do I read a file line by line in Python? Open it and iterate over the lines.",
    "def mean(values):\n    if values:\n        return sum(values) / len(values)\n\n\n\treturn 0\n" + " " * 64 + "x",
    "\n \n  \n    \n\r\n\r\n"
    + "\n" * 20
    + "aaaaaaaaaaaaaaaaaaaaaaaa ababababab 1234567890 000000 ............ ==== <|im_end|>",
    "Die Hauptstadt von Frankreich ist Paris; l'été à Zürich. \u65e5\u672c\u8a9e\u306e\u6587\u7ae0",
]
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def trained(model: Any, trainer: Any, before: Any, normalizer: Any = None, decoder: Any = None) -> Any:
    backend = Tokenizer(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    if before is not None:
        backend.pre_tokenizer = before
    if decoder is not None:
        backend.decoder = decoder
    backend.train_from_iterator(SAMPLE * 3, trainer)
    backend.add_tokens(["<tool>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_start|>")


def byte_level(split: str | None, **more: Any) -> Any:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    before = (
        level if split is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    return trained(models.BPE(), trainer, before, decoder=decoders.ByteLevel(), **more)


def one_piece() -> Any:
    """As Llama 2 and Gemma: no words, the whole text is one piece for the merges."""
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, "<unk>"], show_progress=False)
    return trained(models.BPE(unk_token="<unk>"), trainer, None, normalizers.Replace(" ", "\u2581"))


def unigram() -> Any:
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>")
    collapsed = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), collapsed)


def word_piece() -> Any:
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=[*SPECIAL, "[UNK]"], show_progress=False)
    model = models.WordPiece(unk_token="[UNK]")
    return trained(model, trainer, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())


KINDS: dict[str, Callable[[], Any]] = {
    "GPT-2": lambda: byte_level(None),
    "Llama 3": lambda: byte_level(LLAMA_3),
    "Qwen": lambda: byte_level(LLAMA_3, normalizer=normalizers.NFC()),
    "digits from the right": lambda: byte_level(FROM_THE_RIGHT),
    "one piece": one_piece,
    "unigram": unigram,
    "WordPiece": word_piece,
}
PIECES = [
    *("a", "ab", " ", "\n", "\t", "\r\n", "\n    ", "1", "000", ".", "=", "word ", "Zürich ", "<|im_end|>", "<tool>"),
    *(
        "\u65e5\u672c",
        "e\u0301",
        "\u0301",
        "\U0001f600",
        "\x00",
        "\u2028",
        "\u3000",
        "'ll",
        "Python? ",
        " \n",
        "\u2581",
    ),
]
RUNS = st.lists(st.tuples(st.sampled_from(PIECES), st.integers(1, 900)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: make() for name, make in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=120, deadline=None)
@given(runs=RUNS, end=st.sampled_from(["", "x", "\n", " ", "\nx", "1"]))
@example(runs=[("a", 1), (" ", 439), ("e\u0301", 100), ("Python? ", 80)], end="x")  # WordPiece: a word too long
def test_the_first_tokens_are_those_of_the_whole_text(tokenizers: Any, name: str, runs: Any, end: str) -> None:
    tokenizer, text = tokenizers[name], "".join(piece * count for piece, count in runs) + end
    if text.strip():
        assert token_rows(tokenizer, [text], LIMIT) == [encode_as_text(tokenizer, [text])[0][:LIMIT]]


@pytest.mark.slow
@pytest.mark.parametrize("name", now(KINDS, "Qwen"))
def test_runs_across_the_cut(tokenizers: Any, name: str) -> None:
    """The beginning that is looked at ends after 640 characters: within each of these runs, at every phase."""
    tokenizer = tokenizers[name]
    texts = [
        "x" * lead + piece * 5000 + end
        for piece in PIECES
        for lead in (1, 2, 3)
        for end in ("", "x", "\n", "\n\nx", " 7")
    ]
    texts = [text for text in texts if text.strip()]
    assert token_rows(tokenizer, texts, LIMIT) == [ids[:LIMIT] for ids in encode_as_text(tokenizer, texts)]


@pytest.mark.parametrize(
    "text", ["word " * 3_000_000, "a" * 15_000_000, "1" * 15_000_000, "x" + " " * 15_000_000 + "\nx"]
)
def test_a_huge_text_costs_little(tiny: SearchR3, text: str) -> None:
    started = time.perf_counter()
    (row,) = token_rows(tiny.tokenizer, [text], 512)
    assert time.perf_counter() - started < 5  # the whole text takes minutes
    assert row == encode_as_text(tiny.tokenizer, [text[:20_000]])[0][:512]


def test_short_long_and_tokens_keep_their_places(tiny: SearchR3) -> None:
    texts = [f"text {i} " * (1 if i % 3 else 900) if i % 5 else Tokens((i % 300 + 5, 7)) for i in range(2000)]
    whole = token_rows(tiny.tokenizer, texts)
    assert token_rows(tiny.tokenizer, texts, 3) == [row[:3] for row in whole]
    seen: list[int] = []
    token_rows(tiny.tokenizer, texts, 3, between=lambda rows: seen.append(len(rows)))
    assert seen
    assert seen == sorted(seen)
    with pytest.raises(InputError, match="text 2 of 2 contains token 999999"):
        token_rows(tiny.tokenizer, ["a", Tokens((5, *[6] * 300_000, 999_999))], 3)


def test_what_between_raises_ends_it(tiny: SearchR3) -> None:
    def stop(rows: Any) -> None:
        raise KeyError(len(rows))

    with pytest.raises(KeyError):
        token_rows(tiny.tokenizer, ["word " * 1000] * 200, 512, stop)


def test_a_huge_document_is_embedded_like_its_beginning(tiny: SearchR3) -> None:
    text = "How do I read a file line by line? "
    long, short = tiny.encode_document([text * 400_000, text * 600])
    assert (long == short).all()
