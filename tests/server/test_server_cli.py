"""`search-r3 serve` as its users run it: it starts, answers, stops on SIGTERM, and says in one line what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from processes import start
from serving_tools import eventually

from search_r3.cli import main
from search_r3.cli.serve import print_addresses
from search_r3.server.listening import listen

pytestmark = pytest.mark.slow


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status == 200
    except urllib.error.HTTPError:
        return False


def test_it_starts_answers_and_stops(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "search_r3", "serve", "--model", str(tiny_model), "--port", "0", "--device", "cpu"]
    environment = os.environ | {"SEARCH_R3_API_KEY": "key-of-the-variable"}
    with start(command, env=environment, cwd=tmp_path) as process:
        url = json.loads(process.line('"event": ?"listening"', "stderr"))["url"]
        eventually(lambda: answers(url + "/health"), 60)
        body = json.dumps({"model": "tiny-llama-base", "input": "hello"}).encode()
        request = urllib.request.Request(url + "/v1/embeddings", body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request, timeout=60)
        request.add_header("Authorization", "Bearer key-of-the-variable")
        with urllib.request.urlopen(request, timeout=60) as response:
            assert len(json.load(response)["data"][0]["embedding"]) == 32
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    lines = [json.loads(line) for line in process.stderr.splitlines() if line.startswith("{")]
    assert lines[-1]["event"].startswith("Finished server process")


def test_a_person_is_told_where_the_page_is_and_that_the_server_stopped(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "search_r3", "serve", "--model", str(tiny_model), "--port", "0", "--device", "cpu"]
    with start([*command, "--log-format", "text"], cwd=tmp_path) as process:
        line = process.line("API: ", "stderr")
        url = re.fullmatch(r"API: (http://127.0.0.1:\d+)/docs   Ctrl-C stops\.", line)[1]  # type: ignore[index]
        eventually(lambda: answers(url + "/health"), 60)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert process.stderr.splitlines()[-1] == "Stopped."
    assert re.search(r"(?m)^\d\d:\d\d:\d\d GET /health 200, [\d.]+ ms$", process.stderr)
    assert "error" not in process.stderr
    assert "{" not in process.stderr


def test_the_page_is_named_where_there_is_an_index(capsys: pytest.CaptureFixture) -> None:
    print_addresses("http://127.0.0.1:8000", "tiny", has_index=True)
    assert capsys.readouterr().err.splitlines() == [
        "Search page: http://127.0.0.1:8000/   API: http://127.0.0.1:8000/docs   Ctrl-C stops.",
        "Loading tiny ...",
    ]


def test_what_is_wrong_is_one_line(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    taken = listen("127.0.0.1", 0).socket
    port = str(taken.getsockname()[1])
    (tmp_path / "keys").write_text("")
    for arguments, words in [
        (["nowhere"], ["nowhere does not exist", "search-r3 index"]),
        (["~/nowhere"], [f"{Path.home()}/nowhere does not exist"]),
        (["notes-index", "old/notes-index"], ["'notes-index'", "--index NAME=old/notes-index"]),
        (["--index", "notes-index"], ["--index notes-index: expected a name and a folder"]),
        (["s3://bucket"], ["s3://bucket: give a bucket and a name"]),
        (["--model", str(tiny_model), "--port", port], [f"cannot listen on 127.0.0.1:{port}", "--port"]),
        (["--model", str(tiny_model), "--api-key-file", str(tmp_path / "keys")], ["no API keys"]),
        (["--timeout", "0"], ["timeout is 0.0", "seconds"]),
        (["--queue", "0"], ["--queue", "search-r3 serve --help"]),
        (["--batching", "dynamic"], ["--batching", "dynamic", "continuous", "static"]),
        (["--model", str(tmp_path / "none"), "--port", "0"], ["none"]),
    ]:
        assert main(["serve", *arguments]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("{")]
        assert len(error) == 1
        assert error[0].startswith("error: ")
        assert all(word in error[0] for word in words), error
    taken.close()


def test_a_model_that_may_not_be_read_is_one_line(tiny_model: Path, monkeypatch, capsys) -> None:
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", f"{tiny_model}/config.json")

    monkeypatch.setattr("search_r3.model.searchr3.SearchR3.from_pretrained", refuse)
    assert main(["serve", "--model", str(tiny_model), "--port", "0"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("{")]
    assert error == [
        f"error: {tiny_model}/config.json: permission denied; correct the permissions and run the same command again"
    ]
