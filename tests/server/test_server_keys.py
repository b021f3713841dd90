"""What a key may do and how often, and which pages of other sites may use the server."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from serving_tools import Running, running

from search_r3 import InputError, SearchR3
from search_r3.index.search_index import SearchIndex
from search_r3.server.errors import ApiError
from search_r3.server.keys import ApiKey, Keys
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded

PAGE = "https://app.example.org"


def test_a_rate_is_counted_for_each_key_and_comes_back_evenly() -> None:
    now = 0.0
    keys = Keys([ApiKey("slow", per_minute=3), ApiKey("other", per_minute=3), "free"], clock=lambda: now)
    for _ in range(3):
        keys.check("Bearer slow")
    with pytest.raises(ApiError, match="allows 3 requests a minute; try again in 20 seconds") as caught:
        keys.check("Bearer slow")
    assert (caught.value.status, caught.value.retry_after) == (429, 20)
    keys.check("Bearer other")
    for _ in range(100):
        keys.check("Bearer free")
        assert keys.allow("Bearer slow")  # is not counted
    now = 20.0
    keys.check("Bearer slow")
    with pytest.raises(ApiError):
        keys.check("Bearer slow")
    now = 10_000.0
    for _ in range(3):
        keys.check("Bearer slow")
    with pytest.raises(ApiError):
        keys.check("Bearer slow")


def test_a_reading_key_may_not_change_the_index(tiny: SearchR3, make_index: Callable[[], SearchIndex]) -> None:
    index, keys = make_index(), (ApiKey("reader", may_write=False, per_minute=6), "writer")
    body = {"documents": [{"id": "new", "text": "A new document."}]}
    with running(lambda: Loaded.of(tiny, index), api_keys=keys, writable=True) as server:
        for method, path, sent in (("POST", "/v1/documents", body), ("DELETE", "/v1/documents/bread", None)):
            answer = server.ask(method, path, sent, {"Authorization": "Bearer reader"})
            assert (answer.status, answer.error["code"], answer.error["type"]) == (
                403, "read_only_key", "permission_error"
            )  # fmt: skip
            assert server.ask(method, path, sent).status == 401
        assert server.ask("POST", "/v1/documents", body, {"Authorization": "Bearer writer"}).status == 201
        statuses = [server.ask("GET", "/v1/documents", headers={"Authorization": "Bearer reader"}) for _ in range(7)]
        assert [one.status for one in statuses] == [200] * 6 + [429]
        assert statuses[-1].error["code"] == "rate_limit_exceeded"
        assert int(statuses[-1].headers["retry-after"]) >= 1
        described = server.ask("GET", "/openapi.json").json["paths"]
        assert {"403", "429"} <= described["/v1/documents"]["post"]["responses"].keys()
        assert "403" not in described["/v1/documents"]["get"]["responses"]


def preflight(server: Running, origin: str, path: str = "/v1/search") -> dict[str, str]:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return server.ask("OPTIONS", path, headers={"Origin": origin, **asked}).headers


def test_pages_of_other_sites_are_allowed_only_by_name(tiny: SearchR3, served: Running) -> None:
    assert not {name for name in preflight(served, PAGE) if name.startswith("access-control")}
    with running(lambda: Loaded.of(tiny), cors_origins=(PAGE,), api_keys=("secret",)) as server:
        allowed = preflight(server, PAGE)
        assert allowed["access-control-allow-origin"] == PAGE
        assert "access-control-allow-credentials" not in allowed
        for origin in ("https://evil.example.org", "null", PAGE + ".evil.org", PAGE.replace("https", "http")):
            assert "access-control-allow-origin" not in preflight(server, origin)
        sent = {"model": tiny.name, "input": "x"}
        answer = server.post("/v1/embeddings", sent, Origin=PAGE, Authorization="Bearer secret")
        assert answer.headers["access-control-allow-origin"] == PAGE
        answer = server.post("/v1/embeddings", sent, Origin=PAGE)
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (
            401,
            PAGE,
        )  # so that the page reads it
        assert "access-control-allow-origin" not in server.post("/v1/embeddings", sent, Origin="https://x.org").headers


@pytest.mark.parametrize("origin", ["*", "app.example.org", f"{PAGE}/", f"{PAGE}/a", "null", "https://A.org", ""])
def test_an_origin_is_named_exactly(origin: str) -> None:
    with pytest.raises(InputError, match="is no origin that can be allowed"):
        ServerConfig(cors_origins=(origin,))
