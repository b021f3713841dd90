"""The calibration set of the int8 engine: texts whose activations decide how `quantization` rounds the matrices.

`calibration.txt` has blocks of three lines, separated by empty lines: a question, reasoning about it, and a passage
("\\n" is a line break). The texts are of many kinds and come from no evaluated data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from search_r3.model.tokenization import encode_as_text
from search_r3.prompts import PromptTemplate

LONGEST = 64
"""Texts are truncated to this many tokens: longer ones take time and add little."""
CalibrationRow = tuple[list[int], list[int]]
"""The tokens of the shared prefix, which is computed in float32, and those of the row."""


@cache
def blocks() -> list[list[str]]:
    """The question, reasoning and passage of each block."""
    text = resources.files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")
    return [[line.replace("\\n", "\n") for line in block.splitlines()] for block in text.strip().split("\n\n")]


def calibration_rows(templates: Mapping[str, PromptTemplate], tokenizer: Any, embed_id: int) -> list[CalibrationRow]:
    """The rows of the model's conversations: each passage, each question, and each question with its reasoning."""
    questions, traces, passages = (encode_as_text(tokenizer, list(column)) for column in zip(*blocks(), strict=True))
    rows: list[CalibrationRow] = []
    for side, texts in (("document", passages), ("query", questions), ("reasoning", questions)):
        template = templates[side]
        for ids, trace in zip(texts, traces, strict=True):
            written = [*trace, embed_id] if side == "reasoning" else []
            rows.append((list(template.prefix), [*ids[:LONGEST], *template.suffix, *written]))
    return rows
