"""Traces: what a request's spans say, that they hold no text of a user, and that they are off unless asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from serving_tools import Running, eventually

from search_r3.errors import InputError
from search_r3.server.tracing import (
    NO_TRACES,
    OpenTelemetryTracing,
    Tracing,
    _traces_url,
    endpoint_of,
    open_tracing,
    open_tracing_or_say,
)

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED",
             "OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")  # fmt: skip


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def exporter(served: Running) -> Iterator[Any]:
    """OpenTelemetry's in-memory exporter, which has the spans of `served`."""
    pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed: pip install 'search-r3[tracing]'")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    memory = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    served.service.tracing = OpenTelemetryTracing(provider)
    yield memory
    served.service.tracing = NO_TRACES


def spans(exporter: Any) -> dict[str, Any]:
    """The finished spans by name, once that of the request is there."""
    eventually(lambda: any(span.parent is None or span.parent.is_remote for span in exporter.get_finished_spans()))
    return {span.name: span for span in exporter.get_finished_spans()}


@pytest.mark.parametrize("stream", [False, True])
def test_a_search_has_spans_inside_the_callers_trace(served: Running, exporter: Any, stream: bool) -> None:
    body = {"query": "a secret question", "reasoning": 3, "k": 2, "stream": stream}
    served.ask("POST", "/v1/search", body, {"traceparent": f"00-{TRACE}-{CALLER}-01"})
    found = spans(exporter)
    assert set(found) == {"POST /v1/search", "search", "encode"}
    request, search, encode = found["POST /v1/search"], found["search"], found["encode"]
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == CALLER
    assert request.kind.name == "SERVER"
    assert search.parent.span_id == request.context.span_id
    assert encode.parent.span_id == search.context.span_id
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["http.route"] == "/v1/search"
    assert dict(search.attributes) == {
        "search_r3.mode": "hybrid", "search_r3.k": 2, "search_r3.read": 0, "search_r3.rerank": 0, "search_r3.hits": 2
    }  # fmt: skip
    assert encode.attributes["search_r3.kind"] == "reasoned"
    assert encode.attributes["search_r3.reasoning_tokens"] <= 3
    assert "secret" not in "".join(span.to_json() for span in found.values())


def test_embeddings_and_reranking_have_spans(served: Running, exporter: Any) -> None:
    served.embed(["one text", "another"])
    found = spans(exporter)
    request, encode = found["POST /v1/embeddings"], found["encode"]
    assert request.parent is None
    assert encode.parent.span_id == request.context.span_id
    assert (encode.attributes["search_r3.kind"], encode.attributes["search_r3.texts"]) == ("document", 2)
    exporter.clear()
    served.post("/v1/rerank", {"query": "x", "documents": ["a", "b"]})
    found = spans(exporter)
    assert found["rerank"].parent.span_id == found["POST /v1/rerank"].context.span_id
    assert found["rerank"].attributes["search_r3.texts"] == 2


def test_errors_have_a_type_and_no_message(served: Running, exporter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a secret message")

    monkeypatch.setattr(served.service.index(), "search", fail)
    assert served.post("/v1/search", {"query": "x"}).status == 500
    found = spans(exporter)
    assert found["search"].attributes["error.type"] == "ZeroDivisionError"
    assert found["POST /v1/search"].status.status_code.name == "ERROR"
    assert "secret" not in "".join(span.to_json() for span in found.values())
    exporter.clear()
    assert served.post("/v1/search", {"query": ""}).status == 400
    assert spans(exporter)["POST /v1/search"].status.status_code.name == "UNSET", "the client's mistake"


def test_malformed_trace_headers_begin_a_new_trace(served: Running, exporter: Any) -> None:
    for header in ("00-0-0-01", f"00-{TRACE}-{CALLER}-01-more"):
        exporter.clear()
        served.ask("GET", "/livez", None, {"traceparent": header})
        (span,) = spans(exporter).values()
        assert span.parent is None


def test_there_are_no_traces_unless_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_tracing(None) is NO_TRACES
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    assert endpoint_of(None) == "http://collector:4318"
    assert endpoint_of("http://other") == "http://other"
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert open_tracing(None) is NO_TRACES
    monkeypatch.delenv("OTEL_TRACES_EXPORTER")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert open_tracing(None) is NO_TRACES


def test_what_is_wrong_is_one_line_if_asked_for_and_a_warning_if_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError, match="no address for traces"):
        open_tracing("collector:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(InputError, match="http/protobuf only"):
        open_tracing_or_say("http://collector:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317")
    tracing, say = open_tracing_or_say(None)
    assert tracing is NO_TRACES
    say()
    assert "traces are not sent" in caplog.text


def test_spans_are_sent_to_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs pip install 'search-r3[tracing]'")
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tracing: Tracing = open_tracing(f"http://127.0.0.1:{server.server_address[1]}")
        with tracing.request(None) as request, tracing.span("search", mode="text"):
            request.answered("POST", "/v1/search", 200)
        tracing.close()
        server.shutdown()
    assert [path for path, _ in received] == ["/v1/traces"]
    assert b"POST /v1/search" in received[0][1]
    assert b"search-r3" in received[0][1]


def test_the_path_of_traces_is_added_once() -> None:
    assert _traces_url("http://x:4318") == _traces_url("http://x:4318/") == "http://x:4318/v1/traces"
    assert _traces_url("https://x/y/v1/traces") == "https://x/y/v1/traces"
