"""Metrics for Prometheus: requests, latencies, tokens, queue lengths, batch sizes, cache hits.

Each server has a separate registry, so that two in one process do not mix. No label ever contains a user's text.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Rate:
    """Events per second over the last `seconds`. Thread-safe."""

    def __init__(self, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._clock = seconds, clock
        self._counted: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count events that happened now."""
        with self._lock:
            self._counted.append((self._clock(), count))
            self._drop_old()

    def value(self) -> float:
        """Events per second."""
        with self._lock:
            self._drop_old()
            return sum(count for _, count in self._counted) / self._seconds

    def _drop_old(self) -> None:
        while self._counted and self._counted[0][0] <= self._clock() - self._seconds:
            self._counted.popleft()


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        new: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("search_r3_requests", "Requests answered.", ["route", "status"], **new)
        self.seconds = Histogram(
            "search_r3_request_seconds", "From a request's first byte to its last.", ["route"], buckets=SECONDS, **new
        )
        self.tokens = Counter(
            "search_r3_tokens",
            "Tokens: prompt (users' texts), reasoning (generated), reranked (pairs of query and document).",
            ["kind"],
            **new,
        )
        self.batch_texts = Histogram(
            "search_r3_batch_texts", "Texts in one pass of the model.", ["kind"], buckets=SIZES, **new
        )
        self.batch_seconds = Histogram(
            "search_r3_batch_seconds", "Seconds of one pass of the model.", ["kind"], buckets=SECONDS, **new
        )
        self.cache = Counter(
            "search_r3_reasoned_cache", "Reasoned queries, by whether they were found in the cache.", ["found"], **new
        )
        self.dropped = Counter("search_r3_dropped", "Requests dropped, by reason.", ["reason"], **new)
        self.in_flight = Gauge("search_r3_requests_in_flight", "Requests waiting or being answered.", **new)
        self.ready = Gauge("search_r3_ready", "1 while requests are accepted and can be answered.", **new)
        self.index_events = Counter(
            "search_r3_index_events",
            "Changes of the index: exchanged, refused (of another model), unavailable, available again.",
            ["event"],
            **new,
        )
        self.reasoning_rate = Rate()
        Gauge(
            "search_r3_reasoning_tokens_per_second", "Reasoning tokens per second, over the last ten seconds.", **new
        ).set_function(self.reasoning_rate.value)
        self._slots = Gauge("search_r3_slots", "Reasoned queries that can be generated concurrently.", **new)
        self._slots_in_use = Gauge("search_r3_slots_in_use", "Reasoned queries that are being generated.", **new)
        self._queue_texts = Gauge("search_r3_queue_texts", "Texts waiting for the model.", **new)
        self._queue_tokens = Gauge("search_r3_queue_tokens", "Tokens waiting for the model.", **new)

    def watch_queue(self, waiting: Callable[[], tuple[int, int]]) -> None:
        """Call `waiting` for texts and tokens at every scrape."""
        self._queue_texts.set_function(lambda: waiting()[0])
        self._queue_tokens.set_function(lambda: waiting()[1])

    def watch_index(self, available: Callable[[], bool]) -> None:
        """Call `available` at every scrape: whether the index can be searched."""
        gauge = Gauge("search_r3_index_available", "1 while the index can be searched.", registry=self.registry)
        gauge.set_function(available)

    def watch_slots(self, slots: int, in_use: Callable[[], int]) -> None:
        """The number of slots, and a function that returns at every scrape how many are in use."""
        self._slots.set(slots)
        self._slots_in_use.set_function(in_use)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
