"""An index with its model, opened once and searched from several threads by retrievers, agents and RAG programs.

The model that the index was built with is loaded at the first search that needs it. Searches by words need no model,
and do not wait while it is loaded.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from search_r3.index.index_handle import IndexHandle
    from search_r3.index.run_search import SearchResult
    from search_r3.index.storage.location import Location


class IndexSearcher:
    """Searches one index. It can be pickled; index and model are reopened after unpickling. Copying returns the same
    object.

    Args:
        index: the index's folder, or its location on object storage ("s3://bucket/name").
        model: the index's model: a name, a folder, a hub id or a loaded SearchR3. None uses the one that the index
            names.
        device, dtype: see `SearchR3.from_pretrained`.

    Raises:
        InputError: there is no index, or it is damaged.
    """

    def __init__(self, index: str | Path, model: Any = None, *, device: str | None = None, dtype: str = "auto") -> None:
        from search_r3.index.storage.location import location_of
        from search_r3.integrations.framework_encoder import name_and_model

        self.path: Location = location_of(index)
        self._name, self._model = name_and_model(model)
        self._device, self._dtype = device, dtype
        self._opening, self._loading = threading.Lock(), threading.Lock()
        self._index: IndexHandle | None = None
        self.open()

    def open(self) -> None:
        """Open the index. Raises InputError: there is none, or it is damaged."""
        _ = self.index

    @property
    def index(self) -> IndexHandle:
        """The opened index, which follows changes on disk."""
        with self._opening:
            if self._index is None:
                from search_r3.index.index_handle import IndexHandle

                self._index = IndexHandle(self.path)
            return self._index

    def __getstate__(self) -> dict[str, Any]:
        from search_r3.integrations.framework_encoder import absolute_model_name

        location = self.path.resolve() if isinstance(self.path, Path) else self.path
        model = absolute_model_name(self._name) or None
        return {"index": location, "model": model, "device": self._device, "dtype": self._dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __deepcopy__(self, memo: Any) -> IndexSearcher:
        return self

    @property
    def name(self) -> str:
        """The last component of the index's path."""
        return Path(self.path).name

    @property
    def model_name(self) -> str:
        """The name of the model to load. Raises InputError if the index's model is unknown on this machine."""
        from search_r3.model.model_info import model_of_index

        info = self.index.info
        return self._name or model_of_index(info.model_name, info.model_source, self.path)

    @property
    def loaded(self) -> bool:
        """Whether the model is loaded."""
        return self._model is not None

    def load(self, reasoning: bool | Literal["auto", "latent"] = True, read: int = 0) -> Any:
        """The index's model, loaded on first use.

        Raises:
            InputError: the model is not found, is not the index's, has no rule for `reasoning` "auto" or no latent mode
                for "latent", or was not trained to read and `read` is above 0.
        """
        with self._loading:
            if self._model is None:
                from search_r3.model.searchr3 import SearchR3

                model = SearchR3.from_pretrained(self.model_name, device=self._device, dtype=self._dtype)
                self.index.check_model(model)
                self._model = model
            if reasoning == "auto":
                from search_r3.model.adaptive_reasoning import rule_of

                rule_of(self._model)
            if reasoning == "latent":
                from search_r3.model.latent_steps import check_latent

                check_latent(self._model)
            if read:
                from search_r3.model.reading import check_reading

                check_reading(self._model)
            return self._model

    def search(
        self,
        query: str,
        *,
        k: int = 5,
        mode: Literal["hybrid", "vector", "text"] = "hybrid",
        reasoning: bool | Literal["auto", "latent"] = True,
        max_reasoning_tokens: int = 32,
        reasoning_text: str | None = None,
        read: int = 0,
        hops: int = 1,
        where: str | None = None,
        vector_weight: float | None = None,
    ) -> SearchResult:
        """`search_r3.index.SearchIndex.search`, with the model that belongs to the index.

        Raises:
            InputError: the query is empty, an option is invalid, or the model is not the index's or has no rule for
                "auto" or no latent mode for "latent".
        """
        model = None if mode == "text" else self.load(reasoning, read)
        with nullcontext() if model is None else self._loading:  # one query at a time goes through the model
            return self.index.search(
                query,
                model,
                k=k,
                mode=mode,
                reasoning=reasoning,
                max_reasoning_tokens=max_reasoning_tokens,
                reasoning_text=reasoning_text,
                read=read,
                hops=hops,
                where=where,
                vector_weight=vector_weight,
            )


class LazyIndexSearcher(IndexSearcher):
    """An `IndexSearcher` that opens its index at first use, so that a program starts quickly.

    Raises:
        InputError: there is no folder of that name; whether it is an index is checked when it is opened.
    """

    def open(self) -> None:
        """Only check that there is something to open, without importing LanceDB."""
        if isinstance(self.path, Path) and not self.path.exists():
            super().open()
