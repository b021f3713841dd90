"""The tokenizer of a checkpoint as metadata of a GGUF file: a byte-level BPE, by the names that llama.cpp has for it.

llama.cpp splits a text before the merges by rules of its own, which a file only names (`tokenizer.ggml.pre`). The name
is found here from the rules of the tokenizer itself, not from the base's name: SmolLM2 read from a GGUF by transformers
splits digits otherwise than SmolLM2 from the hub.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from search_r3.errors import InputError

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA_3_SPLIT = rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN_2_SPLIT = rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}"
PRE_TOKENIZERS: dict[tuple[Any, ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", LLAMA_3_SPLIT), ("ByteLevel", False)): "llama-bpe",
    (("Split", QWEN_2_SPLIT), ("ByteLevel", False)): "qwen2",
}
"""The steps of a tokenizer's pre-tokenizer -> llama.cpp's name for it (its `llama_vocab_pre_type`)."""
IGNORE_MERGES = ("llama-bpe",)
"""The names with which llama.cpp takes a word that is in the vocabulary without applying merges."""


@dataclass(frozen=True)
class GGUFVocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: one per id, written in the byte-level alphabet, except special and other added tokens.
        types: one per id, of `gguf.TokenType`.
        merges: pairs joined by a space, in their order.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]


def gguf_vocabulary(tokenizer: Any) -> GGUFVocabulary:
    """The vocabulary of a transformers tokenizer, one entry for each id below `len(tokenizer)`.

    Raises:
        InputError: it is not a byte-level BPE, or splits a text by rules for which llama.cpp has no name.
    """
    from gguf import TokenType

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("it has no fast form (tokenizer.json)")
    record = json.loads(backend.to_str())
    model = record["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("continuing_subword_prefix"):
        raise _refused(f"it is no byte-level BPE, but {model['type']}")
    if record["normalizer"] not in (None, {"type": "NFC"}):
        raise _refused(f"it normalizes texts by {record['normalizer'].get('type')}")
    pre = PRE_TOKENIZERS.get(_steps(record["pre_tokenizer"]))
    if pre is None or bool(model.get("ignore_merges")) != (pre in IGNORE_MERGES):
        raise _refused("it splits texts by rules for which llama.cpp has no name")
    tokens = [f"[UNUSED{i}]" for i in range(len(tokenizer))]
    types = [int(TokenType.UNUSED)] * len(tokens)
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, int(TokenType.NORMAL)
    for added in record["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return GGUFVocabulary(pre, tokens, types, merges)


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[Any, ...]:
    """The pre-tokenizer's steps, each with what decides its splits; () if one of them is not understood."""
    if pre_tokenizer is None:
        return ()
    steps: list[tuple[str, Any]] = []
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(own_rules)}:
                steps.append(("ByteLevel", own_rules))
            case {"type": "Digits", "individual_digits": bool(single)}:
                steps.append(("Digits", single))
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                steps.append(("Split", regex))
            case _:
                return ()
    return tuple(steps)


def _refused(why: str) -> InputError:
    return InputError(f"this model's tokenizer cannot be written as GGUF: {why}; export with --format safetensors")
