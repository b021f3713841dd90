"""Golden vectors: embeddings of fixed texts, stored with a checkpoint, that every later load must reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from search_r3.files import atomic_path
from search_r3.model.reading import has_reading

GOLDEN_FILE = "golden.safetensors"
GOLDEN_TEXTS = (
    "How do I read a file line by line in Python?",
    "Aspirin lowers the risk of heart attack in middle-aged men.",
    "def mean(values):\n    return sum(values) / len(values)",
    "Die Hauptstadt von Frankreich ist Paris.",
    "x",
    "A rocket's thrust is the reaction to the momentum of the gas that it throws away. " * 8,
)


def golden(model: Any) -> dict[str, np.ndarray]:
    """Embeddings of the golden texts by a SearchR3: "document" and "query", float32 (len(GOLDEN_TEXTS), dimension).

    A model that reads also has "reading": each text with the two before it as its passages.
    """
    texts = list(GOLDEN_TEXTS)
    vectors = {"document": model.encode_document(texts), "query": model.encode_query(texts, reasoning=False)}
    if has_reading(model):
        passages = [[texts[i - 1], texts[i - 2]] for i in range(len(texts))]
        vectors["reading"] = model.encode_query(texts, passages=passages, reasoning=False)
    return vectors


def write_golden(model: Any, folder: Path) -> None:
    """Store the golden vectors of a SearchR3 in `folder`."""
    from safetensors.numpy import save_file

    with atomic_path(folder / GOLDEN_FILE) as scratch:
        save_file(golden(model), scratch)


def read_golden(folder: Path) -> dict[str, np.ndarray] | None:
    """The golden vectors stored in `folder`, as `golden` returned them; None if there are none."""
    from safetensors.numpy import load_file

    file = folder / GOLDEN_FILE
    return load_file(file) if file.is_file() else None


def check_golden(model: Any) -> float | None:
    """The largest cosine distance between a SearchR3's golden vectors and those stored with its checkpoint.

    None if the checkpoint has none. Usual values are below 1e-4 in float32, about 1e-3 in bfloat16 and below 1e-2 in
    int8; larger ones mean another base, another prompt or a broken engine.
    """
    stored = read_golden(model.checkpoint.path)
    if stored is None:
        return None
    current = golden(model)
    return float(max((1 - (stored[side] * current[side]).sum(1)).max() for side in stored.keys() & current.keys()))
