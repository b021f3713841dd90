"""SearchR3 as an encoder for MTEB 2 (Muennighoff et al. 2023, https://arxiv.org/abs/2210.07316), with metadata.

Queries and documents have different prompts, and only queries are reasoned about. Texts of tasks without this
distinction (similarity, clustering, classification) are embedded as documents.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import InputError
from search_r3.optional import optional_imports

MTEB_NAMES = {"scifact": "SciFact", "hotpotqa": "HotpotQA", "cosqa": "CosQA", "mkqa": "MKQARetrieval"}
"""MTEB's names of the data sets used in our recipes."""
TEACHERS = {"all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2"}
ORGANIZATION = "search-r3"
"""MTEB requires names of the form owner/name."""
NO_EMBEDDING = -1.0
"""The similarity of an empty text, which has no embedding: the lowest possible cosine, so that nothing ranks lower."""


class SearchR3Encoder:
    """A SearchR3 model that implements mteb's EncoderProtocol, for `mteb.evaluate`.

    Example:
        >>> import mteb  # doctest: +SKIP
        >>> from search_r3.evaluation.baselines.mteb_encoder import SearchR3Encoder
        >>> encoder = SearchR3Encoder("search-r3-smollm2-135m-sft", reasoning=True, max_reasoning_tokens=32)
        >>> mteb.evaluate(encoder, mteb.get_tasks(tasks=["SciFact"]))

    Args:
        model_name: a loaded SearchR3 model, or any name accepted by `SearchR3.from_pretrained`.
        revision: the contract hash (or a prefix of it) that the model must have; None accepts any.
        device: see `SearchR3.from_pretrained`; do not set it for a loaded model.
        reasoning: reason about queries before they are embedded.
        max_reasoning_tokens: the budget of the reasoning.
        max_length: tokens kept of each document; 512 by default.
        dtype: see `SearchR3.from_pretrained`.
        batch_size: texts per forward pass; None uses MTEB's.
        training: the folder that documents the model's training (as `search-r3 card --run` fills it), for the training
            data in the metadata. Without it, the metadata says that the training data is unknown.

    Raises:
        InputError: an unknown or damaged model, another revision, or a bad number.
    """

    def __init__(
        self,
        model_name: Any,
        revision: str | None = None,
        *,
        device: str | None = None,
        reasoning: bool = True,
        max_reasoning_tokens: int = 32,
        max_length: int | None = None,
        dtype: str = "auto",
        batch_size: int | None = None,
        training: str | Path | None = None,
    ) -> None:
        from search_r3.model.searchr3 import DEFAULT_DOCUMENT_TOKENS, SearchR3

        for name, value, least in (
            ("max_reasoning_tokens", max_reasoning_tokens, 0),
            ("max_length", max_length, 1),
            ("batch_size", batch_size, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} must be {least} or more, not {value}")
        named = isinstance(model_name, str | Path)
        self.model = SearchR3.from_pretrained(model_name, device=device, dtype=dtype) if named else model_name
        if revision is not None and not self.model.contract_hash.startswith(revision):
            actual = self.model.contract_hash[:12]
            raise InputError(
                f"{self.model.name} has contract {actual}, not {revision}; get the checkpoint with that contract"
            )
        self.reasoning = reasoning
        self.max_reasoning_tokens = max_reasoning_tokens
        self.max_length = DEFAULT_DOCUMENT_TOKENS if max_length is None else max_length
        self.batch_size = batch_size
        self.training = Path(training) if training is not None else None

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embed a task's texts.

        Args:
            inputs: batches with the texts under "text"; MTEB prepends titles to documents.
            task_metadata, hf_split, hf_subset: not used; the model's prompts are the same for all tasks.
            prompt_type: mteb's PromptType or its value: "query", "document", or None if the task has no such sides.
            kwargs: mteb's encode_kwargs, of which `batch_size` and `show_progress_bar` are used.

        Returns:
            float32 (n, dimension): unit rows; zeros for an empty text (see `similarity`).
        """
        texts = [text for batch in inputs for text in batch["text"]]
        filled = [index for index, text in enumerate(texts) if text.strip()]
        rows = np.zeros((len(texts), self.model.dimension), dtype=np.float32)
        if not filled:
            return rows
        settings: dict[str, Any] = {
            "batch_size": self.batch_size or kwargs.get("batch_size") or 32,
            "show_progress_bar": kwargs.get("show_progress_bar"),
        }
        chosen = [texts[index] for index in filled]
        if getattr(prompt_type, "value", prompt_type) == "query":
            rows[filled] = self.model.encode_query(
                chosen, reasoning=self.reasoning, max_reasoning_tokens=self.max_reasoning_tokens, **settings
            )
        else:
            rows[filled] = self.model.encode_document(chosen, max_length=self.max_length, **settings)
        return rows

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines between all pairs of rows, float32 (n, m); -1 for empty texts."""
        a, b = _rows(embeddings1), _rows(embeddings2)
        scores = a @ b.T
        scores[~a.any(axis=1)] = NO_EMBEDDING
        scores[:, ~b.any(axis=1)] = NO_EMBEDDING
        return scores

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines between corresponding rows, float32 (n,); -1 for empty texts."""
        a, b = _rows(embeddings1), _rows(embeddings2)
        return np.where(a.any(axis=1) & b.any(axis=1), (a * b).sum(axis=1), np.float32(NO_EMBEDDING))

    @cached_property
    def mteb_model_meta(self) -> Any:
        """mteb's ModelMeta of this model, with None for unknown fields.

        Raises:
            InputError: mteb is not installed, or `training` documents no training.
        """
        with optional_imports("mteb", "MTEB"):
            from mteb.models import ModelMeta
            from mteb.models.model_meta import ScoringFunction
        network = self.model.checkpoint.model
        embedding = network.get_input_embeddings().weight.numel()
        memory = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
        return ModelMeta(
            loader=None,  # names of the form owner/name are not on the hub, so only loaded encoders can be evaluated
            name=f"{ORGANIZATION}/{self.model.name}",
            revision=self.model.contract_hash,
            release_date=None,
            languages=["eng-Latn"],
            n_parameters=sum(parameter.numel() for parameter in network.parameters()),
            n_embedding_parameters=embedding,
            memory_usage_mb=round(memory / 2**20, 1),
            max_tokens=self.max_length,
            embed_dim=self.model.dimension,
            license=self._license,
            open_weights=True if self._license else None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=True,
            training_datasets=None if self.training is None else trained_on(self.training),
            experiment_kwargs=self._settings,
        )

    @property
    def _settings(self) -> dict[str, Any]:
        """The settings that distinguish two runs of one model; mteb stores their results under different names."""
        reasoning = self.max_reasoning_tokens if self.reasoning else "off"
        return {"reasoning": reasoning, "dtype": str(self.model.dtype)}

    @property
    def _license(self) -> Any:
        from search_r3.model.resolve import BUNDLED

        base = BUNDLED.get(self.model.contract.base)
        return base.license.lower() if base else None


def trained_on(kept: str | Path) -> set[str]:
    """The data sets that a model was trained on, by MTEB's names: those that its pairs were made from, whatever the
    split, and those of a teacher that selected its pairs or provided soft labels.

    Args:
        kept: the folder that documents the training, with `pairs.manifest.json` and maybe `selection.manifest.json`.

    Raises:
        InputError: the manifest is missing or damaged, or the training data of the teacher is unknown.
    """
    from search_r3.evaluation.publish.model_card import MANIFESTS

    files = [Path(kept) / name for name in MANIFESTS]
    try:
        records = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file() or file is files[0]]
        used = {source["dataset"] for source in records[0]["sources"] if source.get("dataset")}
        scorers = [record.get("scorer") or {} for record in records]
        teachers = {str(scorer["teacher"]) for scorer in scorers if scorer.get("teacher")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{files[0]} does not say what the model was trained on: {error}") from error
    names = {MTEB_NAMES.get(name.split("/")[0], name) for name in used}
    for teacher in teachers:
        names |= _teachers_data(teacher)
    return names


def _teachers_data(teacher: str) -> set[str]:
    import mteb

    if teacher not in TEACHERS:
        raise InputError(f"the training data of the teacher {teacher} is unknown; known: {', '.join(TEACHERS)}")
    return set(mteb.get_model_meta(TEACHERS[teacher]).training_datasets or ())


def _rows(embeddings: Any) -> np.ndarray:
    array = np.asarray(embeddings.cpu() if hasattr(embeddings, "cpu") else embeddings, dtype=np.float32)
    return np.atleast_2d(array)
