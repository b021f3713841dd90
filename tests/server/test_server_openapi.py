"""schemathesis over the whole description: nothing undocumented, no 500, what the schema allows is accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from serving_tools import Running, running

schemathesis = pytest.importorskip("schemathesis")
from search_r3 import SearchR3  # noqa: E402
from search_r3.index.search_index import SearchIndex  # noqa: E402
from search_r3.server.routes.web_page import PAGE  # noqa: E402
from search_r3.server.service import Loaded  # noqa: E402


@pytest.fixture(scope="module")
def open_server(tiny: SearchR3, make_index: Callable[[], SearchIndex]) -> Iterator[Running]:
    index = make_index()
    with running(lambda: Loaded.of(tiny, index), writable=True, max_reasoning_tokens=40) as server:
        yield server


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_the_description_is_kept_to(open_server: Running, mode: str) -> None:
    schema = schemathesis.openapi.from_url(open_server.url + "/openapi.json")
    refusals = schema.config.checks.negative_data_rejection
    refusals.expected_statuses = [*refusals.expected_statuses, "413"]  # of bodies with too long a text
    checked = []
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode == "negative" and not (operation.body or operation.query):
            continue  # there is nothing that could be wrong

        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
        @settings(
            max_examples=10,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case) -> None:
            case.call_and_validate()

        check()
        checked.append(operation.label)
    assert len(checked) == {"positive": 12, "negative": 4}[mode]


def test_when_to_come_back_is_described_wherever_it_is_said(open_server: Running) -> None:
    paths = open_server.ask("GET", "/openapi.json").json["paths"]
    required: dict[str, set[bool]] = {}
    for operations in paths.values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if "Retry-After" in response.get("headers", {}):
                    required.setdefault(status, set()).add(response["headers"]["Retry-After"]["required"])
    assert required == {"409": {False}, "429": {True}, "503": {True}}  # a conflict that passes by itself says when


def test_every_route_is_described(open_server: Running) -> None:
    described = set(open_server.ask("GET", "/openapi.json").json["paths"])
    routes = {
        getattr(route, "path", "").replace(":path", "").replace(":any_text", "")
        for route in open_server.server.config.app.routes
    }
    page = {f"/{file.name}" for file in PAGE.iterdir()}
    assert routes - described <= {"/openapi.json", "/docs", "/"} | page
    assert described <= routes


def test_wrong_methods_and_paths_are_answered_in_form(open_server: Running) -> None:
    for method in ("PUT", "DELETE", "PATCH", "TRACE", "GET"):
        answer = open_server.ask(method, "/v1/embeddings")
        assert (answer.status, answer.headers["allow"], answer.error["code"]) == (405, "POST", "method_not_allowed")
    assert open_server.ask("DELETE", "/v1/documents").headers["allow"] == "GET, HEAD, POST"
    for path in ("/v2", "/v1/embeddings/", "/v1/%00", "/%ff", "/.git/config", "//etc/passwd"):
        assert open_server.ask("GET", path).error["code"] == "not_found"


def test_the_page_for_people_needs_nothing_from_elsewhere(open_server: Running) -> None:
    page = open_server.ask("GET", "/docs")
    text = page.body.decode()
    assert page.headers["content-type"].startswith("text/html")
    for path in open_server.ask("GET", "/openapi.json").json["paths"]:
        assert f"<code>{path}</code>" in text
    assert "<script" not in text
    assert "https://" not in text
    assert "max_items" not in text
