"""`search-r3 ask`: it indexes a folder on first use, notices changed files, and lets a running server answer."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from search_r3.cli import main
from search_r3.index.cached_index import CachedIndex
from search_r3.index.run_search import SearchResult
from search_r3.server.running import RunningServer, announced, running_server

ASK = "search_r3.cli.ask"


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "tides.md").write_text("# Tides\n\nThe moon pulls the sea.\n")
    (folder / "bread.md").write_text("# Bread\n\nYeast lets the dough rise.\n")
    return folder


def asked(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert main(["ask", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("this must not be called")


def test_it_indexes_once_and_again_only_what_changed(
    notes: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (str(notes), "what pulls the sea", "--model", str(tiny_model), "--no-reasoning", "-k", "9")
    first = asked(capsys, *arguments)
    assert {hit["path"] for hit in first["hits"]} == {"tides.md", "bread.md"}
    assert set(first["timings_ms"]) == {"files", "model", "index", "search", "total"}
    assert Path(first["index"]).is_relative_to(os.environ["SEARCH_R3_CACHE"])
    with monkeypatch.context() as patched:
        patched.setattr(f"{ASK}._update", refuse)
        second = asked(capsys, *arguments)
    assert second["hits"] == first["hits"]
    assert set(second["timings_ms"]) == {"files", "model", "search", "total"}
    (notes / "stars.md").write_text("# Stars\n\nThey shine at night.\n")
    (notes / "bread.md").unlink()
    third = asked(capsys, *arguments)
    assert {hit["path"] for hit in third["hits"]} == {"tides.md", "stars.md"}
    assert main(["ask", *arguments]) == 0
    printed = capsys.readouterr()
    assert "tides.md:" in printed.out
    assert "timed: files " in printed.err
    assert ", total " in printed.err


def test_an_index_of_an_earlier_model_of_that_name_is_made_again(
    notes: Path, tiny_model: Path, other_tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = tmp_path / "model"
    arguments = (str(notes), "what pulls the sea", "--model", str(name), "--no-reasoning")
    for model in (tiny_model, other_tiny_model):
        name.unlink(missing_ok=True)
        name.symlink_to(model)
        answer = asked(capsys, *arguments)
        assert "index" in answer["timings_ms"]
        assert len(answer["hits"]) == 2


def test_another_model_and_another_folder_have_other_indexes(notes: Path) -> None:
    one, other = CachedIndex.of(notes, "a"), CachedIndex.of(notes, "b")
    assert one.folder != other.folder
    assert not one.up_to_date
    one.folder.mkdir(parents=True)
    one.completed()
    assert CachedIndex.of(f"{notes}/../notes", "a").up_to_date
    (notes / "tides.md").write_text("changed")
    assert not CachedIndex.of(notes, "a").up_to_date


def test_what_cannot_be_indexed_is_one_line(notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", str(notes / "none"), "what"]) == 2
    assert "none: No such file or directory; give a folder" in capsys.readouterr().err


@pytest.fixture
def server() -> Iterator[dict[str, Any]]:
    """A server that answers every request with `answer`, and keeps what was asked."""
    state: dict[str, Any] = {"asked": [], "status": 200, "answer": {}}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state["asked"].append((self.path, body, self.headers.get("Authorization")))
            payload = json.dumps(state["answer"]).encode()
            self.send_response(state["status"])
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: Any) -> None:
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    state["url"] = f"http://127.0.0.1:{running.server_port}"
    yield state
    running.shutdown()
    running.server_close()
    thread.join(10)


def test_a_running_server_answers_and_no_model_is_loaded(
    notes: Path, tiny_model: Path, server: dict[str, Any], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = (str(notes), "what pulls the sea", "--model", str(tiny_model))
    local = asked(capsys, *arguments)
    server["answer"] = {**local, "usage": {}, "remembered_ms": None}
    monkeypatch.setenv("SEARCH_R3_API_KEY", "secret,other")
    with announced(local["index"], server["url"], "notes"), monkeypatch.context() as patched:
        patched.setattr(f"{ASK}.load_fast", refuse)
        remote = asked(capsys, *arguments)
        assert remote["server"] == server["url"]
        assert set(remote["timings_ms"]) == {"files", "server", "total"}
        assert remote["hits"] == local["hits"]
        path, body, key = server["asked"][0]
        assert (path, body["query"], body["reasoning"], key) == ("/v1/search", arguments[1], 32, "Bearer secret")
        assert body["index"] == "notes"
        assert main(["ask", *arguments]) == 0
        assert "cosine" in capsys.readouterr().out
        patched.undo()
        server["status"] = 503
        assert asked(capsys, *arguments)["server"] is None  # it answers itself
    assert running_server(local["index"]) is None


def test_only_a_process_that_runs_is_a_server(notes: Path, tmp_path: Path) -> None:
    index = tmp_path / "some-index"
    assert running_server(index) is None
    with announced(index, "http://127.0.0.1:1", "some"):
        assert running_server(f"{tmp_path}/x/../some-index") == RunningServer("http://127.0.0.1:1", "some")
        (file,) = (tmp_path / "cache" / "servers").iterdir()
        file.write_text(json.dumps({"url": "http://127.0.0.1:2", "index": "some", "process": 2**22 + 1}))
        assert running_server(index) is None
        file.write_text("no json")
        assert running_server(index) is None
    assert file.exists()  # not ours anymore


def test_a_result_is_the_same_after_json(notes: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = asked(capsys, str(notes), "what pulls the sea", "--model", str(tiny_model))
    again = SearchResult.from_dict(record)
    assert json.loads(json.dumps(again.to_dict())) == {name: record[name] for name in again.to_dict()}
    with pytest.raises(KeyError):
        SearchResult.from_dict({"query": "x"})
