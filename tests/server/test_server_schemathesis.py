"""schemathesis as its users run it, over a server with everything, one that wants keys, and one without an index.

test_server_openapi.py draws random requests; here are the examples of the whole description and its edges: each limit
and one beyond it, each field missing, each wrong type, methods that are not there. Hundreds of requests: some seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner
from serving_tools import running

pytest.importorskip("schemathesis")
from schemathesis.cli import schemathesis

from search_r3 import SearchR3
from search_r3.index.search_index import SearchIndex
from search_r3.server.service import Loaded

pytestmark = pytest.mark.slow

KEY = "key-of-this-test"
SMALL = {"max_items": 4, "max_request_tokens": 200, "max_reasoning_tokens": 8, "reasoning_tokens": 4}
"""Limits within reach, so that what is beyond them is asked for; 413 for a long body would hide what is wrong in it."""


@pytest.mark.parametrize(
    ("settings", "index", "operations", "phases"),
    [
        pytest.param({"writable": True}, True, 18, "examples,coverage", id="everything"),
        pytest.param({"writable": True, "api_keys": (KEY,)}, True, 18, "examples", id="keys"),
        pytest.param({}, False, 12, "examples", id="no index"),
    ],
)
def test_the_edges_of_the_description_are_kept_to(
    settings: dict[str, Any],
    index: bool,
    operations: int,
    phases: str,
    tiny: SearchR3,
    make_index: Callable[[], SearchIndex],
) -> None:
    opened = make_index() if index else None
    with running(lambda: Loaded.of(tiny, opened), **SMALL, **settings) as server:
        described = server.ask("GET", "/openapi.json").json["paths"]
        assert sum(len(methods) for methods in described.values()) == operations
        command = ["run", server.url + "/openapi.json", "--phases", phases, "--continue-on-failure"]
        command += ["--generation-deterministic", "-H", f"Authorization: Bearer {KEY}"]
        found = CliRunner().invoke(schemathesis, command)
        assert found.exit_code == 0, found.output
        assert f"{operations} selected / {operations} total" in found.output, found.output
