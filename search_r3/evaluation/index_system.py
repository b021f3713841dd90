"""An index as a system under evaluation: judged queries are searched for as `search-r3 search` searches for them.

`index:PLACE` searches by meaning and words, `index.vector:PLACE` by meaning, `index.text:PLACE` by words; PLACE is a
folder or an address (s3://, milvus://). The index must hold the data set's documents, and no others.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal

from search_r3.errors import InputError
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.systems import Answers, System, clean_name
from search_r3.model.engines.registry import TORCH
from search_r3.optional import optional_imports
from search_r3.progress import progress_bar

if TYPE_CHECKING:
    from search_r3.index.search_index import SearchIndex

SPEC = re.compile(r"index(?:\.(?P<mode>vector|text))?:(?P<place>.+)", re.DOTALL)
REASONING: dict[str, bool | Literal["latent"]] = {"off": False, "on": True, "latent": "latent"}
"""The modes in which it can be searched, and what `SearchIndex.search` calls them."""
By = Literal["hybrid", "vector", "text"]


class IndexSystem:
    """An opened index, in one mode.

    Args:
        model: the index's model; None for a search by words.
        by: what is searched by: "hybrid", "vector" or "text".
        mode: a key of `REASONING`; None for a search by words.
    """

    def __init__(
        self,
        index: SearchIndex,
        model: Any,
        name: str,
        by: By,
        mode: str | None,
        max_reasoning_tokens: int = 32,
        show_progress: bool | None = None,
    ) -> None:
        self.index, self.model, self.by, self.mode = index, model, by, mode
        self.name = name if mode is None else f"{name}.{mode}"
        self.max_reasoning_tokens, self.show_progress = max_reasoning_tokens, show_progress
        self.device = str(getattr(getattr(getattr(model, "checkpoint", None), "model", None), "device", "cpu"))

    @property
    def identity(self) -> dict[str, Any]:
        tuned = self.index.backend.tuned_fusion if self.by == "hybrid" else None
        identity: dict[str, Any] = {
            "index": str(self.index.info.identity),
            "backend": self.index.backend.name,
            "chunks": len(self.index),
            "by": self.by,
            "fusion": None if tuned is None else asdict(tuned),
            "max_length": None,
            "dtype": None if self.model is None else str(self.model.dtype).removeprefix("torch."),
            "contract_hash": None if self.model is None else self.model.contract_hash,
        }
        if (engine := getattr(self.model, "engine_spec", TORCH)) is not TORCH:
            identity["engine"] = engine.name
        if self.mode is None:
            return identity
        return identity | {"mode": self.mode, "max_reasoning_tokens": self.max_reasoning_tokens}

    def answer(
        self, documents: Mapping[str, str], queries: Mapping[str, str], k: int, cache: EmbeddingCache | None
    ) -> Answers:
        self._check(documents)
        started = time.perf_counter()
        run, reasoning = {}, []
        with progress_bar(f"{self.name}: queries", len(queries), self.show_progress) as advance:
            for name, query in queries.items():
                found = self.index.search(
                    query,
                    self.model,
                    k=k,
                    mode=self.by,
                    reasoning=REASONING[self.mode or "off"],
                    max_reasoning_tokens=self.max_reasoning_tokens,
                )
                run[name] = {hit.document: hit.score for hit in found.hits}
                if found.reasoning is not None and self.mode == "on":
                    reasoning.append({"qid": name, **asdict(found.reasoning)})
                advance(1)
        return Answers(run, 0.0, time.perf_counter() - started, reasoning or None)

    def _check(self, documents: Mapping[str, str]) -> None:
        """Raise InputError unless the index holds these documents and no others."""
        held = {document for document, _, _ in self.index.backend.listed()}
        for names, what in ((documents.keys() - held, "lacks"), (held - documents.keys(), "also holds")):
            if names:
                raise InputError(
                    f'the index {self.index.path} {what} {len(names):,} documents, such as "{min(names)}", so it is '
                    "not one of this data set; make one with search-r3 index FOLDER/corpus.jsonl"
                )


def is_index_spec(source: str) -> bool:
    """Whether a system's spec, without its label, is an index. Raises InputError if it is one of a wrong place."""
    match = SPEC.fullmatch(source)
    if match is None:
        return False
    with optional_imports("search", "the evaluation of an index"):
        from search_r3.index.storage.location import location_of

    location_of(match["place"])
    return True


def open_index_systems(
    source: str,
    label: str | None,
    modes: Sequence[str],
    *,
    max_reasoning_tokens: int = 32,
    device: str | None = None,
    dtype: str = "auto",
    engine: str = "auto",
    show_progress: bool | None = None,
) -> list[System]:
    """One system for each mode, with the index's model loaded once.

    Raises:
        InputError: there is no such index, its model is not known here, or a mode is none of `REASONING`.
    """
    match = SPEC.fullmatch(source)
    assert match is not None
    from search_r3.index.search_index import SearchIndex

    place, by = match["place"], match["mode"] or "hybrid"
    index = SearchIndex.open(place, follow=False)
    name = label or clean_name(f"{PurePath(place).name}-{by}")
    if by == "text":
        return [IndexSystem(index, None, name, "text", None, show_progress=show_progress)]
    if others := [mode for mode in modes if mode not in REASONING]:
        raise InputError(f"an index is not evaluated in mode {others[0]}; choose from: {', '.join(REASONING)}")
    from search_r3.model.model_info import model_of_index
    from search_r3.model.searchr3 import SearchR3

    known = model_of_index(index.info.model_name, index.info.model_source, place)
    model = SearchR3.from_pretrained(known, device=device, dtype=dtype, engine=engine)
    index.check_model(model)
    return [IndexSystem(index, model, name, by, mode, max_reasoning_tokens, show_progress) for mode in modes]  # type: ignore[arg-type]  # vector or hybrid
