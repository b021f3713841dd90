"""Spans for OpenTelemetry: the request, and in it the search and each wait for the model; off unless asked for.

https://opentelemetry.io/docs/specs/otel/trace/. Attributes have counts, modes and routes, never a user's text; of an
exception a span has the type alone, as messages quote values. Sampling, headers and limits are set by OpenTelemetry's
own variables (`OTEL_TRACES_SAMPLER`, `OTEL_EXPORTER_OTLP_HEADERS`, ...).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, TypeVar

from search_r3.errors import InputError
from search_r3.optional import optional_imports
from search_r3.server.logs import log

T = TypeVar("T")
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's variables for where traces go."""
SERVICE = "search-r3"


class Span:
    """A span that is not recorded."""

    def set(self, **attributes: str | int | float | bool) -> None:
        """Add attributes, whose names get the prefix `search_r3.`."""

    def answered(self, method: str, route: str, status: int) -> None:
        """Say what a request was, and how it was answered."""

    def fields(self) -> dict[str, str]:
        """The span's identity for a line of the log."""
        return {}


class Tracing:
    """No traces."""

    @contextmanager
    def request(self, traceparent: str | None) -> Iterator[Span]:
        """A span around a request, a part of the caller's trace if there is one."""
        yield Span()

    @contextmanager
    def span(self, name: str, **attributes: str | int | float | bool) -> Iterator[Span]:
        """A span inside the current one."""
        yield Span()

    def carried(self, run: Callable[..., T]) -> Callable[..., T]:
        """`run` for another thread, where its spans are inside the current one; for one call."""
        return run

    def close(self) -> None:
        """Send what was not sent yet."""


NO_TRACES = Tracing()


class _OpenSpan(Span):
    def __init__(self, span: Any) -> None:
        self._span = span

    def set(self, **attributes: str | int | float | bool) -> None:
        self._span.set_attributes({f"search_r3.{name}": value for name, value in attributes.items()})

    def answered(self, method: str, route: str, status: int) -> None:
        from opentelemetry.trace import StatusCode

        self._span.update_name(f"{method} {route}")
        self._span.set_attributes(
            {"http.request.method": method, "http.route": route, "http.response.status_code": status}
        )
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)

    def fields(self) -> dict[str, str]:
        context = self._span.get_span_context()
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}


class OpenTelemetryTracing(Tracing):
    """Spans by a `opentelemetry.sdk.trace.TracerProvider`."""

    def __init__(self, provider: Any) -> None:
        from search_r3 import __version__

        self._provider, self._tracer = provider, provider.get_tracer("search_r3", __version__)

    @contextmanager
    def request(self, traceparent: str | None) -> Iterator[Span]:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {} if traceparent is None else {"traceparent": traceparent}
        parent = TraceContextTextMapPropagator().extract(carrier)
        with self._open("request", context=parent, kind=SpanKind.SERVER) as span:
            yield span

    @contextmanager
    def span(self, name: str, **attributes: str | int | float | bool) -> Iterator[Span]:
        with self._open(name) as span:
            span.set(**attributes)
            yield span

    def carried(self, run: Callable[..., T]) -> Callable[..., T]:
        context = copy_context()
        return lambda *arguments, **options: context.run(run, *arguments, **options)

    def close(self) -> None:
        self._provider.shutdown()

    @contextmanager
    def _open(self, name: str, **options: Any) -> Iterator[Span]:
        from opentelemetry.trace import StatusCode

        quiet = {"record_exception": False, "set_status_on_exception": False}
        with self._tracer.start_as_current_span(name, **quiet, **options) as span:
            try:
                yield _OpenSpan(span)
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(StatusCode.ERROR)
                raise


def endpoint_of(option: str | None) -> str | None:
    """Where traces go: the command's option, else OpenTelemetry's variables; None for nowhere."""
    if option is not None:
        return option
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    return next((value for name in ENDPOINTS if (value := os.environ.get(name))), None)


def open_tracing(option: str | None) -> Tracing:
    """Traces that are sent by OTLP over HTTP (protobuf) to the address that is asked for, in batches, by a thread.

    Args:
        option: the collector's address, `http://HOST:4318`; None leaves it to OpenTelemetry's variables, without which
            there are no traces.

    Raises:
        InputError: the address is none, the variables ask for gRPC, or packages are missing.
    """
    if endpoint_of(option) is None:
        return NO_TRACES
    if option is not None and not option.startswith(("http://", "https://")):
        raise InputError(f"{option!r} is no address for traces; give a collector's, such as http://localhost:4318")
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if (protocol := os.environ.get(name, "http/protobuf")) != "http/protobuf":
            raise InputError(f"{name} is {protocol!r}, but traces are sent as http/protobuf only (port 4318); unset it")
    with optional_imports("tracing", "sending traces"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from search_r3 import __version__

    named = {"service.name": os.environ.get("OTEL_SERVICE_NAME") or SERVICE, "service.version": __version__}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    exporter = OTLPSpanExporter() if option is None else OTLPSpanExporter(endpoint=_traces_url(option))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OpenTelemetryTracing(provider)


def open_tracing_or_say(option: str | None) -> tuple[Tracing, Callable[[], None]]:
    """`open_tracing`, and a function to be called once there is a log.

    Variables may be set for all programs of a machine: if nothing was asked for by the option, what is wrong with them
    is a warning in the log, and there are no traces.
    """
    try:
        return open_tracing(option), lambda: None
    except InputError as error:
        if option is not None:
            raise
        reason = str(error)
        return NO_TRACES, lambda: log("traces are not sent", logging.WARNING, reason=reason)


def _traces_url(endpoint: str) -> str:
    """The address to which traces are posted."""
    path = "/v1/traces"
    return endpoint if endpoint.endswith(path) else endpoint.rstrip("/") + path
