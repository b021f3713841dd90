"""A server's state: model, index and batcher, from loading to shutdown, and which requests are accepted.

The model is loaded in a thread while the socket already listens, so that `/health` can answer "loading".
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from search_r3.errors import InputError
from search_r3.index.index_handle import Event, IndexHandle, IndexUnavailable
from search_r3.index.search_index import SearchIndex
from search_r3.model.checkpoint import read_record
from search_r3.model.concurrent_reasoning import concurrent_reasoning_of
from search_r3.model.latent_steps import has_latent
from search_r3.model.reading import has_reading
from search_r3.model.reasoned import REASONING_TEXT_TOKENS
from search_r3.model.searchr3 import SearchR3
from search_r3.model.text_limit import TextLimit, TooLong, check_room
from search_r3.rerankers.base import Reranker
from search_r3.server.batching.batcher import Batcher
from search_r3.server.batching.continuous import ContinuousBatcher
from search_r3.server.batching.query_cache import QueryCache
from search_r3.server.batching.queued_encoder import QueuedEncoder
from search_r3.server.batching.static_batching import StaticBatcher
from search_r3.server.errors import ApiError, from_input_error
from search_r3.server.index_writer import IndexWriter
from search_r3.server.keys import Keys
from search_r3.server.logs import log
from search_r3.server.metrics import Metrics
from search_r3.server.named_indexes import name_of
from search_r3.server.request_memory import LargeBodies
from search_r3.server.server_config import ServerConfig
from search_r3.server.tracing import NO_TRACES, Tracing

Index = SearchIndex | IndexHandle
Status = Literal["loading", "ready", "terminating", "stopping", "failed"]
"""How far a server is; "terminating" is the pause before it stops, when it still answers but is not ready."""
NOT_READY: dict[str, str] = {
    "loading": "the model is still being loaded",
    "terminating": "the server is about to shut down",
    "stopping": "the server is shutting down",
    "failed": "the model could not be loaded; see the server's log",
}
MAX_RETRY = 60  # seconds; maximum of Retry-After
NAMES_LISTED = 20
"""Number of indexes that an error names."""


@dataclass(frozen=True)
class Loaded:
    """What is served: a model, its indexes by name (the first is the default), the sizes that embeddings may have
    (`dimensions`), whether reasoning may be "auto" (`adaptive`), and perhaps a cross-encoder; without one, the model's
    embeddings rerank."""

    model: SearchR3
    indexes: Mapping[str, IndexHandle]
    dimensions: tuple[int, ...]
    adaptive: bool
    reranker: Reranker | None = None

    @classmethod
    def of(
        cls,
        model: SearchR3,
        index: Index | Mapping[str, Index] | None = None,
        reranker: Reranker | None = None,
    ) -> Loaded:
        """Read the sizes that the checkpoint was trained for, and open the indexes so that their changes are followed.

        Args:
            index: the index, named after its folder, or several by name.

        Raises:
            InputError: an index is missing, or was made with a model that embeds into another space.
        """
        given: Mapping[str, Index] = {}
        if index is not None:
            given = index if isinstance(index, Mapping) else {name_of(str(index.path)): index}
        handles = {name: one if isinstance(one, IndexHandle) else IndexHandle(one.path) for name, one in given.items()}
        for handle in handles.values():
            handle.check_model(model)
        record = read_record(model.checkpoint.path) or {}
        smaller = {int(size) for size in record.get("dimensions", []) if 0 < int(size) < model.dimension}
        adaptive = bool(handles) and model.adaptive_rule is not None
        return cls(model, handles, (*sorted(smaller), model.dimension), adaptive, reranker)

    @property
    def latent(self) -> bool:
        """Whether queries may be embedded in latent steps."""
        return has_latent(self.model)

    @property
    def reading(self) -> int:
        """The number of passages that the model was trained to read with a query; 0 if it cannot read."""
        return self.model.reading.passages if self.model.reading is not None else 0

    @property
    def reranker_name(self) -> str:
        """The name of the model that reranks."""
        return self.model.name if self.reranker is None else self.reranker.name

    def check_name(self, name: str) -> None:
        """Raise ApiError 404 if a model of this name is not served."""
        _check_name(name, self.model.name)

    def check_reranker_name(self, name: str | None) -> None:
        """Raise ApiError 404 if a name is given, and it is not that of the model that reranks."""
        if name is not None:
            _check_name(name, self.reranker_name)


def _check_name(name: str, served: str) -> None:
    if name != served:
        message = f"the model {name[:100]!a} is not served here; this server has {served!a}"
        raise ApiError(404, message, "model_not_found", param="model")


class Service:
    """A server's model, index and batcher, and the requests in flight.

    Args:
        config: its limits.
        load: returns what to serve; runs in a thread. Its exception is kept in `failure`.
        on_failure: called if loading fails.
    """

    def __init__(
        self, config: ServerConfig, load: Callable[[], Loaded], on_failure: Callable[[], None] = lambda: None
    ) -> None:
        self.config, self._load, self._on_failure = config, load, on_failure
        self.metrics, self.keys = Metrics(), Keys(config.api_keys)
        self.tracing: Tracing = NO_TRACES
        self.status: Status = "loading"
        self.failure: Exception | None = None
        self.in_flight = 0
        self.dropped = False  # whether the end of the grace period cut requests off
        self.cache = QueryCache(config.cache)
        self.threads = ThreadPoolExecutor(config.search_threads, thread_name_prefix="search")
        self.tokenizing = ThreadPoolExecutor(2, thread_name_prefix="tokenize")
        self.bulk = ThreadPoolExecutor(1, thread_name_prefix="bulk")
        self.bodies = LargeBodies(config.max_bodies, self.tokenizing)
        self._writers: dict[str, IndexWriter] = {}
        self.limit = TextLimit.of(config.max_tokens)
        self._loaded: Loaded | None = None
        self._batcher: Batcher | None = None
        self._closed = threading.Event()
        self.metrics.ready.set_function(lambda: self.health()[0] == "ready")

    def start(self) -> None:
        """Begin loading."""
        threading.Thread(target=self._start, name="load", daemon=True).start()

    def announce_end(self) -> None:
        """Be not ready from now on, but go on answering requests."""
        if self.status == "ready":
            self.status = "terminating"

    def reconfigure(self, config: ServerConfig) -> list[str]:
        """Take over limits, times and keys, and return the names of those that changed. Requests in flight may still
        use the former ones; the threads, the cache and the batcher stay as they are.
        """
        changed = [
            field.name for field in fields(config) if getattr(config, field.name) != getattr(self.config, field.name)
        ]
        self.config, self.keys = config, Keys(config.api_keys)
        return changed

    def stop_taking(self) -> None:
        """Answer new requests with 503 from now on; those in flight continue."""
        if self.status != "failed":
            self.status = "stopping"

    def close(self, grace: float) -> None:
        """Finish accepted requests within `grace` seconds, and stop the threads. Blocks."""
        self.stop_taking()
        self._closed.set()
        if self._batcher is not None and not self._batcher.close(grace):
            self.dropped = True
            log("requests dropped at shutdown", 30)
        for writer in self._writers.values():
            writer.close()
        self.threads.shutdown(wait=False, cancel_futures=True)
        self.tokenizing.shutdown(wait=False, cancel_futures=True)
        self.bulk.shutdown(wait=False, cancel_futures=True)

    @property
    def loaded(self) -> Loaded:
        """What is served. Raises ApiError 503 while nothing is loaded."""
        if self._loaded is None:
            raise self._not_ready()
        return self._loaded

    @property
    def known(self) -> Loaded | None:
        """What is served, or None while nothing is loaded."""
        return self._loaded

    @property
    def batcher(self) -> Batcher:
        """The batcher. Raises ApiError 503 while nothing is loaded."""
        if self._batcher is None:
            raise self._not_ready()
        return self._batcher

    def index(self, name: str | None = None) -> IndexHandle:
        """The index of this name, or the default one.

        Raises:
            ApiError: 404 if the server has none, or none of this name; 503 while it cannot be searched.
        """
        index = self.loaded.indexes[self.index_name(name)]
        if (problem := index.problem) is not None:
            raise from_input_error(IndexUnavailable(problem))
        return index

    def index_name(self, name: str | None) -> str:
        """`name`, or that of the default index. Raises ApiError 404 if the server has no such index."""
        names = list(self.loaded.indexes)
        if not names:
            raise ApiError(404, "this server has no index; start it with one: search-r3 serve INDEX", "no_index")
        if name is not None and name not in names:
            known = ", ".join(f"{one!a}" for one in names[:NAMES_LISTED]) + ", ..." * (len(names) > NAMES_LISTED)
            message = f"the index {name[:100]!a} is not served here; this server has {known}"
            raise ApiError(404, message, "index_not_found", param="index")
        return names[0] if name is None else name

    def writable_index(self, name: str | None = None) -> IndexHandle:
        """An index, for changes. Raises ApiError as `index` does, and 503 if one of another model replaced it."""
        index = self.index(name)
        if (refusal := index.refusal) is not None:
            raise from_input_error(IndexUnavailable(refusal))
        return index

    def writer(self, name: str | None = None) -> IndexWriter:
        """What commits the changes of an index. Raises ApiError 404 as `index` does."""
        return self._writers[self.index_name(name)]

    def health(self) -> tuple[Status | Literal["index_unavailable"], str | None]:
        """Whether requests are accepted and can be answered ("ready"); and why not, or a warning, in one line. Of
        several indexes one that can be searched is enough.

        It does no work, so it may be called as often as needed.
        """
        if self.status != "ready" or self._loaded is None:
            return self.status, NOT_READY.get(self.status)
        indexes = self._loaded.indexes.values()
        problems = [problem for index in indexes if (problem := index.problem) is not None]
        if problems and len(problems) == len(indexes):
            return "index_unavailable", "; ".join(problems)
        refusals = [refusal for index in indexes if (refusal := index.refusal) is not None]
        return "ready", "; ".join([*problems, *refusals]) or None

    def too_long(self, asked: TooLong | None, *, document: bool = False) -> TooLong:
        """What happens to a text that is over the limit, if a request asks for it, else by the server's settings."""
        chosen = asked or self.config.too_long
        return "truncate" if chosen == "split" and not document else chosen

    def encoder(self, on_text: Callable[[str], None] | None = None, too_long: TooLong = "truncate") -> QueuedEncoder:
        """The encoder that the index uses for one request."""
        limit = replace(self.limit, too_long=too_long)
        return QueuedEncoder(self.loaded.model, self.batcher, limit, on_text, self.tracing)

    def enter(self) -> None:
        """Accept a request; `leave` must follow.

        Raises:
            ApiError: 503 while loading or stopping, 429 if too many are in flight.
        """
        if self.status not in ("ready", "terminating"):
            raise self._not_ready()
        if self.in_flight >= self.config.queue:
            self.metrics.dropped.labels("queue full").inc()
            raise ApiError(
                429,
                f"{self.in_flight} requests are in flight, which is this server's limit; try again later",
                "queue_full",
                retry_after=self.retry_after(),
            )
        self.in_flight += 1
        self.metrics.in_flight.set(self.in_flight)

    def leave(self) -> None:
        """Record that a request is done."""
        self.in_flight -= 1
        self.metrics.in_flight.set(self.in_flight)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A context that calls `enter` and `leave`."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def reasoning_budget(self, reasoning: bool | int | str | None) -> int | None:
        """The maximum number of reasoning tokens, or None without reasoning; for "auto", the budget if it reasons.

        Raises:
            ApiError: 400 if there is no rule for "auto" or no mode for "latent", or the budget is over the limit.
        """
        if reasoning == "latent":
            if not self.loaded.latent:
                raise ApiError(
                    400,
                    "this server's model was not trained for latent steps, or its engine has none; say true, false or "
                    "a number of tokens",
                    "no_latent_mode",
                    param="reasoning",
                )
            return None
        if reasoning == "auto":
            if not self.loaded.adaptive:
                raise ApiError(
                    400,
                    'reasoning "auto" decides by the cosines of a search: it needs a server with an index, and a model '
                    "that has a rule (search-r3 study fits it); use true, false or a number of tokens",
                    "no_adaptive_rule",
                    param="reasoning",
                )
            return self.config.reasoning_tokens
        if reasoning is None or reasoning is False:
            return None
        if reasoning is True:
            return self.config.reasoning_tokens
        if int(reasoning) > (limit := self.config.max_reasoning_tokens):
            message = f"reasoning is {reasoning} tokens, the limit is {limit}"
            raise ApiError(400, message, "budget_too_large", param="reasoning")
        return int(reasoning)

    def check_read(self, read: int) -> None:
        """Raise ApiError 400 if a search is to read passages and the model cannot."""
        if read and not self.loaded.reading:
            message = "this server's model was not trained to read; search with read 0"
            raise ApiError(400, message, "no_reading_mode", param="read")

    def check_rerank(self, rerank: int, k: int) -> None:
        """Raise ApiError if so many hits cannot be reranked: 400 without a cross-encoder, 409 if `k` is more."""
        if rerank and self.loaded.reranker is None:
            message = "this server has no cross-encoder (serve --reranker MODEL); search with rerank 0"
            raise ApiError(400, message, "no_reranker", param="rerank")
        if 0 < rerank < k:
            message = f"rerank is {rerank}, k is {k}; rerank at least as many hits as are to be returned"
            raise ApiError(409, message, "conflict", param="rerank")

    def retry_after(self) -> int:
        """Seconds after which the queue is expected to be shorter."""
        seconds = self._batcher.seconds_left() if self._batcher is not None else 1.0
        return max(1, min(MAX_RETRY, math.ceil(seconds)))

    def _not_ready(self) -> ApiError:
        what = NOT_READY.get(self.status, NOT_READY["loading"])
        return ApiError(503, f"{what}; try again later", f"not_ready_{self.status}", retry_after=2)

    def _start(self) -> None:
        try:
            loaded = self._load()
            _check_limit(loaded.model, self.config)
            warm_up(loaded.model)
            if loaded.reranker is not None:
                loaded.reranker.score("warm up", ["warm up"])
        except Exception as error:
            self.failure = error
            self.status = "failed"
            log("model could not be loaded", 40, error)
            self._on_failure()
            return
        self._batcher = make_batcher(loaded.model, self.config, self.cache, self.metrics)
        self.metrics.watch_queue(self._batcher.waiting)
        if loaded.indexes:
            self.metrics.watch_index(lambda: all(index.problem is None for index in loaded.indexes.values()))
        self._writers = {name: IndexWriter(self.config.add_threads) for name in loaded.indexes}
        self._loaded = loaded
        if self.status == "loading":
            self.status = "ready"
        kind = type(self._batcher).__name__
        for index in loaded.indexes.values():
            index.on_event = self._index_event
            threading.Thread(target=self._watch, args=(index,), name="index", daemon=True).start()
        log("ready", model=loaded.model.name, index=bool(loaded.indexes), batcher=kind)

    def _watch(self, index: IndexHandle) -> None:
        """Check the index periodically, so that searches need not, and /health is up to date."""
        while not self._closed.wait(index.every):
            index.check()

    def _index_event(self, event: Event, line: str) -> None:
        self.metrics.index_events.labels(event).inc()
        log(f"index {event}", 30 if event in ("refused", "unavailable") else 20, reason=line)


def make_batcher(model: Any, config: ServerConfig, cache: QueryCache, metrics: Metrics) -> Batcher:
    """The batcher that `config.batching` names, or the static one if the model's engine has no slots."""
    slots = concurrent_reasoning_of(model) if config.batching == "continuous" else None
    if slots is None:
        return StaticBatcher(model, config, cache, metrics)
    return ContinuousBatcher(model, slots, config, cache, metrics)


def _check_limit(model: Any, config: ServerConfig) -> None:
    """Raise InputError if `max_tokens` is more than the model's context leaves."""
    if config.max_tokens is None:
        return
    try:
        check_room(model, config.max_tokens, max(config.max_reasoning_tokens, REASONING_TEXT_TOKENS))
    except InputError as error:
        raise InputError(f"{error} (max_request_tokens is the limit of a request's texts together)") from error


def warm_up(model: Any) -> None:
    """Run every kind of pass once, so that the prompts' prefixes are computed and the tokenizer is set up."""
    model.encode_document(["warm up"], show_progress_bar=False)
    model.encode_query(["warm up"], reasoning=False)
    model.reason(["warm up"], max_reasoning_tokens=1)
    if has_latent(model):
        model.encode_query(["warm up"], reasoning="latent")
    if has_reading(model):
        model.encode_query(["warm up"], passages=[["warm up"]], reasoning=False)
