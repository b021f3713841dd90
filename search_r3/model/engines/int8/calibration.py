"""Texts that show which inputs a model's matrices see, so that `int8_rounding` can round them accordingly.

`calibration.txt` holds them: a question, an analysis of it and a passage, a line each ("\\n" is a line break), an empty
line between three and three. They are of many kinds and of no data set that is evaluated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from search_r3.model.tokenization import encode_as_text
from search_r3.prompts import Frame

LONGEST = 64
"""Tokens at which a passage is cut: longer ones add time, and little that is new."""
Sample = tuple[list[int], list[int]]
"""Tokens that many rows begin with, which are computed in floats; and a row's own."""


@cache
def blocks() -> list[list[str]]:
    """Question, analysis and passage of each block."""
    text = resources.files(__package__).joinpath("calibration.txt").read_text(encoding="utf-8")
    return [[line.replace("\\n", "\n") for line in block.splitlines()] for block in text.strip().split("\n\n")]


def samples(frames: Mapping[str, Frame], tokenizer: Any, embed_id: int) -> list[Sample]:
    """The texts in the model's own conversations: each passage, each question, and each with its analysis behind it."""
    questions, analyses, passages = (encode_as_text(tokenizer, list(column)) for column in zip(*blocks(), strict=True))
    rows: list[Sample] = []
    for side, texts in (("document", passages), ("query", questions), ("reasoning", questions)):
        frame = frames[side]
        for ids, analysis in zip(texts, analyses, strict=True):
            written = [*analysis, embed_id] if side == "reasoning" else []
            rows.append((list(frame.prefix), [*ids[:LONGEST], *frame.suffix, *written]))
    return rows
