"""schemathesis over the whole description: nothing undocumented, no 500, what the schema allows is accepted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from pydantic import BaseModel
from serving_tools import Running, running

schemathesis = pytest.importorskip("schemathesis")
from search_r3 import SearchR3  # noqa: E402
from search_r3.index.search_index import SearchIndex  # noqa: E402
from search_r3.server import api_page, response_schemas  # noqa: E402
from search_r3.server.routes.web_page import HEADERS, PAGE  # noqa: E402
from search_r3.server.service import Loaded  # noqa: E402


def has_example(model: Any) -> bool:
    """Whether this is a body with an example."""
    is_body = isinstance(model, type) and issubclass(model, BaseModel)
    return is_body and "example" in (model.model_config.get("json_schema_extra") or {})


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
    assert len(checked) == {"positive": 18, "negative": 10}[mode]


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
    assert page.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
    for path in open_server.ask("GET", "/openapi.json").json["paths"]:
        assert f"<code>{path}</code>" in text
    assert not re.search(r"<script>|<style|\son\w+=|\sstyle=|https://", text)
    assert set(re.findall(r'(?:src|href)="([^"#]+)"', text)) == {
        "icon.svg", "style.css", "api.css", "theme.js", "api.js", "./", "openapi.json"
    }  # fmt: skip
    assert "max_items" not in text
    assert "`" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL)


def test_fields_are_in_plain_words(open_server: Running) -> None:
    description = open_server.ask("GET", "/openapi.json").json
    by_path = {(one.verb, one.path): one for one in api_page.operations(description, "http://x")}
    documents, queries = by_path["post", "/v1/embeddings"].fields
    assert (documents.title, queries.title) == ("For documents", "For queries")
    assert {row.name: row.kind for row in documents.rows}["input"] == (
        "text, list of texts, list of token ids or list of lists of token ids"
    )
    assert documents.rows[0].required
    rows = {row.name: row for row in by_path["post", "/v1/search"].fields[0].rows}
    assert (rows["k"].kind, rows["k"].default) == ("whole number from 1 to 1,000", "10")
    assert rows["mode"].kind == '"hybrid", "vector" or "text"'
    assert "whole number from 0 to 40" in rows["reasoning"].kind
    delete = next(one for one in by_path.values() if one.verb == "delete")
    assert delete.changes
    assert delete.examples[0].curl.startswith("curl -X DELETE ")
    assert list(delete.answers) == sorted(delete.answers)
    for operation in by_path.values():
        for example in operation.examples:
            compile(example.python, operation.path, "exec")


@pytest.mark.parametrize("name", [name for name, model in vars(response_schemas).items() if has_example(model)])
def test_the_examples_of_responses_have_their_form(name: str) -> None:
    model = getattr(response_schemas, name)
    model.model_validate(model.model_config["json_schema_extra"]["example"])


def test_requests_can_be_tried_in_a_browser(open_server: Running, browser: Any, barriers: Any) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(60_000)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: request.url.startswith(open_server.url) or problems.append(request.url))
    page.goto(f"{open_server.url}/docs")
    page.locator("#search .tablist button", has_text="Python").click()
    assert page.locator("#search pre[data-kind=Python]").is_visible()
    assert not page.locator("#search pre[data-kind=curl]").is_visible()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#search pre[data-kind=curl]").is_visible()
    page.locator("#search .try summary").click()
    page.fill("#search-body", '{"query": "<b>train</b>", "k": 1, "reasoning": false}')
    page.locator("#search .try button").click()
    page.locator("#search .outcome", has_text="200").wait_for()
    assert json.loads(page.locator("#search .answer").text_content() or "")["query"] == "<b>train</b>"
    page.fill("#search-body", "{")
    page.locator("#search .try button").click()
    page.locator("#search .outcome", has_text="The body is not JSON").wait_for()
    assert barriers(page) == []
    for width in (390, 320):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.emulate_media(color_scheme="dark")
    assert barriers(page) == []
    page.locator("header nav a").click()
    page.wait_for_url(f"{open_server.url}/")
    assert problems == []
    page.close()
