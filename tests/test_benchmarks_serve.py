"""The serving benchmark and the load test on tiny random models: what is measured is right. No time is asserted.

Servers run in threads here: starting a real process imports everything again.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from benchmark_scripts import benchmark_scripts

pytest.importorskip("uvicorn")
from search_r3 import SearchR3, demo
from search_r3.data.beir import BeirDataset, Document, write_beir
from search_r3.data.sources.docstrings import docstring_pairs
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument
from search_r3.server.listening import listen
from search_r3.server.logs import LOGGER, log_to
from search_r3.server.run_server import make_server
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """The benchmarks' modules, freshly imported, their workers run in this process."""
    loggers = [logging.getLogger(name) for name in (LOGGER, "uvicorn", "uvicorn.error")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    with benchmark_scripts(monkeypatch) as found:
        yield found
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture
def threads(scripts: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> type:
    """`ServerProcess`, but a thread of this process; `started` are those that were."""
    process = scripts("serve_client").ServerProcess
    known = inspect.signature(ServerConfig).parameters

    class InThread(process):  # type: ignore[misc,valid-type]
        started: ClassVar[list[Any]] = []
        overrides: ClassVar[dict[str, Any]] = {}

        def __init__(self, index: Path | None = None, *, threads: int | None = None, **options: Any) -> None:
            self.options = options
            settings = {**{k: v for k, v in options.items() if k in known and v is not None}, **self.overrides}
            model = SearchR3.from_pretrained(options["model"], device="cpu", dtype=options["dtype"])
            opened = None if index is None else SearchIndex.open(index)
            self.written = StringIO()
            log_to(self.written)
            self.server = make_server(ServerConfig(**settings), lambda: Loaded.of(model, opened))
            self.bound = listen("127.0.0.1", 0).socket
            self.host, self.port = self.bound.getsockname()
            self.thread = threading_thread(self.server.run, self.bound)
            self.started.append(self)

        pid = property(lambda self: os.getpid())

        def log(self) -> str:
            return self.written.getvalue()

        def terminate(self) -> None:
            self.server.handle_exit(15, None)

        def wait(self, seconds: float) -> int | None:
            self.thread.join(seconds)
            return None if self.thread.is_alive() else 0

        def stop(self) -> None:
            self.terminate()
            assert self.wait(30) == 0
            self.bound.close()

        def _alive(self, end: float) -> None:
            assert self.thread.is_alive()

    for name in ("serve_bench", "serve_parts", "serve_llama", "load", "load_large"):
        monkeypatch.setattr(scripts(name), "ServerProcess", InThread)
    return InThread


def threading_thread(run: Callable[..., Any], bound: Any) -> threading.Thread:
    thread = threading.Thread(target=run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def run(
    scripts: Callable[[str], ModuleType],
    threads: type,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., dict[str, Any]]:
    """benchmarks/serve.py on functions of the standard library; the report."""
    pairs = docstring_pairs(["json", "logging", "email"])[0][:40]
    corpus = {f"d{i:02}": Document(f"d{i:02}", "", pair.positive) for i, pair in enumerate(pairs)}
    parts = {"test": pairs[:20], "dev": pairs[20:]}
    everyone = {f"{split}{i}": pair.query for split, part in parts.items() for i, pair in enumerate(part)}
    place = {pair.positive: name for pair, name in zip(pairs, corpus, strict=True)}
    for split, part in parts.items():
        qrels = {f"{split}{i}": {place[pair.positive]: 1} for i, pair in enumerate(part)}
        write_beir(tmp_path / "beir", BeirDataset("beir", corpus, everyone, qrels), split)

    def run(*arguments: str) -> dict[str, Any]:
        fixed = ["--tiny", "--model", tiny_model, "--dataset", tmp_path / "beir", "--json", tmp_path / "out.json"]
        sizes = ["--engines", "torch", "torch:float32", "--rounds", "2", "--clients", "1", "3", "--peer-sizes", "2"]
        sizes += ["--budget", "4", "--peer-budget", "4", "--batching-budget", "4", "--batching-clients", "2"]
        monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, fixed), *sizes, *arguments])
        scripts("serve").main()
        return json.loads((tmp_path / "out.json").read_text())

    return run


@pytest.mark.nightly
def test_every_part_is_measured_and_the_report_is_whole(
    run: Callable[..., dict[str, Any]], threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = [SourceDocument(f"m{i}", "", f"Return the {i}th element of a list of numbers.", {}) for i in range(9)]
    monkeypatch.setattr(demo, "standard_library", lambda: passages)
    report = run("--only", "documents", "queries", "quality", "batching", "answer", "peer")
    assert {"benchmark", "command", "commit", "seed", "versions", "hardware", "figures"} <= set(report)
    figures = report["figures"]
    assert figures["documents"]["documents"] == 8
    assert figures["documents"]["torch"]["documents_per_second"] > 0
    assert figures["documents"]["torch"]["times"] > 0
    assert "times" not in figures["documents"]["torch:float32"]
    assert len({server.options["cache"] for server in threads.started}) == 1
    for clients, requests in ((1, 4), (3, 6)):
        for engine in ("torch", "torch:float32"):
            one = figures["queries"][f"{clients} clients"][engine]
            assert one["requests"] == 2 * requests
            assert 0 < one["p50_seconds"] <= one["p99_seconds"]
            assert 0 <= one["mean_reasoning_tokens"] <= 4
    same = [figures["queries"]["3 clients"][engine]["mean_reasoning_tokens"] for engine in ("torch", "torch:float32")]
    assert same[0] == same[1]  # they were asked the same queries
    quality = figures["quality"]
    assert (quality["queries"], quality["documents"]) == (8, 24)
    assert quality["torch"]["distance_off"] == quality["torch"]["distance_on"] == 0
    assert quality["torch"]["same_analyses"] == 8
    assert 0 <= quality["torch:float32"]["ndcg_off"] <= 1
    for load in ("its own lengths", "budgets used up", "exponential lengths"):
        assert figures["batching"][load]["continuous"]["times"] > 0
    assert {server.options.get("batching") for server in threads.started} == {None, "continuous", "static"}
    answer = figures["answer"]["torch"]
    assert 0 < answer["answer_p50_seconds"] <= answer["answer_p95_seconds"]
    assert answer["wrote_nothing"] == 3 or answer["first_word_p50_seconds"] <= answer["answer_p50_seconds"]
    peer = figures["peer"]["batch 2"]
    assert (peer["queries"], peer["same_analysis"]) == (2, 2)
    assert peer["largest_cosine_distance"] < 1e-4
    names = Counter(goal["name"].split(":")[0] for goal in figures["goals"])
    assert names["queries at 1 clients"] == names["queries at 3 clients"] == names["nDCG@10 off"] == 1
    assert len(figures["goals"]) == 11
    for goal in figures["goals"]:
        wanted = goal["found"] <= goal["at_most"] if "at_most" in goal else goal["found"] >= goal["at_least"]
        assert goal["met"] == wanted


@pytest.mark.nightly
def test_the_server_of_llama_cpp_is_asked_the_same(run: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip("xllamacpp", reason="no llama.cpp: pip install 'search-r3[llama-cpp]'")
    # With two threads on a busy machine, each waits for the other at every operation: a minute for eight documents.
    found = run("--only", "llama", "--threads", "1")["figures"]["llama"]
    peer = "llama.cpp's server"
    for system in ("torch", peer):
        assert found["start"][system]["seconds"] > 0
        assert found["start"][system]["resident_bytes"] > 1e6
        assert found["documents"][system]["documents_per_second"] > 0
        for clients in ("1 clients", "3 clients"):
            one = found["queries"][clients][system]
            assert 0 < one["p50_seconds"] <= one["p99_seconds"]
            assert (one["first_token_p50_seconds"] is None) == (system == "torch")
    assert found["queries"]["3 clients"]["times"] > 0


@pytest.mark.nightly
def test_a_killed_run_goes_on_and_other_settings_are_refused(
    run: Callable[..., dict[str, Any]],
    scripts: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    parts = scripts("serve_parts")
    loops: list[list[bytes]] = []
    real, dies_at = parts.closed_loop, 3

    def loop(server: Any, bodies: list[bytes], clients: int) -> Any:
        if len(loops) == dies_at:
            raise KeyboardInterrupt
        loops.append(list(bodies))
        return real(server, bodies, clients)

    monkeypatch.setattr(parts, "closed_loop", loop)
    work = ("--only", "queries", "--work", str(tmp_path / "work"))
    with pytest.raises(KeyboardInterrupt):
        run(*work)
    dies_at = 99
    figures = run(*work)["figures"]
    assert len(loops) == 2 * 2 * 2  # systems, numbers of clients, rounds: none twice
    assert figures["queries"]["3 clients"]["torch"]["requests"] == 12
    texts = Counter(json.loads(body)["input"] for bodies in loops for body in bodies)
    assert set(texts.values()) == {2}  # every query once to each system
    run(*work)
    assert len(loops) == 8
    with pytest.raises(SystemExit, match=r"budget 4 \(now 5\)"):
        run(*work, "--budget", "5")


@pytest.mark.nightly
def test_answers_out_of_the_cache_are_no_measurement(
    run: Callable[..., dict[str, Any]],
    threads: Any,
    scripts: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads.overrides = {"cache": 1000}
    run("--only", "queries", "--clients", "1")  # distinct queries: none is there
    monkeypatch.setattr(scripts("serve"), "ENDINGS", ("",))
    with pytest.raises(SystemExit, match="out of the server's cache"):
        run("--only", "queries", "--clients", "1", "--requests", "30")  # 60 of 40


def test_an_error_is_no_answer(threads: Any, scripts: Callable[[str], ModuleType], tiny_model: Path) -> None:
    client = scripts("serve_client")
    server = threads(model=str(tiny_model), dtype="float32").ready()
    good = client.embedding_body(server.model, "text", budget=2)
    assert len(client.closed_loop(server, [good] * 3, 2).latencies) == 3
    with pytest.raises(SystemExit, match="answered 404"):
        client.closed_loop(server, [good, client.embedding_body("other", "text")], 2)
    server.stop()


def test_options_that_serve_has_not_are_named(scripts: Callable[[str], ModuleType]) -> None:
    options = scripts("serve_client").serve_options
    assert options(max_body=5, model=None) == ["--max-body", "5"]
    with pytest.raises(SystemExit, match="no option --no-such-thing"):
        options(no_such_thing=1)


def test_a_tiny_run_writes_nothing_where_real_results_are(
    scripts: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    monkeypatch.setattr(scripts("common"), "write_report", lambda *a, **k: written.append(a))
    bench = SimpleNamespace(goals=[], kept=SimpleNamespace(commits=[]))
    monkeypatch.setattr(scripts("serve"), "prepare", lambda *_: bench)
    monkeypatch.setattr(scripts("serve"), "about", lambda _: {})
    monkeypatch.setattr(scripts("serve_parts"), "documents", lambda _: {})
    monkeypatch.setattr(scripts("load"), "run", lambda *_: {"outcomes": {}, "goals": [], "examples": []})
    for name, arguments in (("serve", ["--only", "documents"]), ("load", [])):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny", *arguments])
        scripts(name).main()
    assert not written


# --------------------------------------------------------------------------------------------------------- the load


@pytest.mark.nightly
def test_a_crowd_with_rubbish_in_it_is_stood(
    scripts: Callable[[str], ModuleType],
    threads: type,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Too short for memory, threads and files to settle, and how much is done depends on the machine."""
    times = ["--clients", "12", "--seconds", "2", "--warm-up", "0.3", "--quiet", "0.1", "--grace", "1", "--queue", "3"]
    fixed = ["--tiny", "--model", str(tiny_model), "--budget", "3", "--json", str(tmp_path / "load.json")]
    fixed += ["--large", "0.3", "--large-seconds", "0.5"]
    monkeypatch.setattr(sys, "argv", ["load.py", *fixed, *times])
    load = scripts("load")
    monkeypatch.setattr(load, "TEXTS", 12)
    monkeypatch.setattr(scripts("load_large"), "EVERY", 0.2)
    load.main()
    figures = json.loads((tmp_path / "load.json").read_text())["figures"]
    missed = {goal["name"] for goal in figures["goals"] if not goal["met"]}
    unsettled = {f"{name}, growth" for name in ("resident memory", "threads", "open files")}
    unsettled |= {
        "large texts: resident memory, growth",
        "large texts: seconds that the slowest small request takes longer",
    }
    assert missed <= unsettled | {"good requests answered", "seconds to stop"}, (missed, figures["examples"])
    assert figures["accepted_and_answered"] > 0
    assert figures["requests"] > figures["accepted_and_answered"]
    assert figures["large"]["statuses"].keys() <= {"beginning: 200", "whole: 200", "whole: left"}
    for name in ("alone", "beginnings", "large"):
        assert figures["large"]["small_requests"][name]["requests"] > 0
    assert figures["shutdown"]["answers_logged"] == figures["shutdown"]["answers_arrived"] > 0


def test_what_is_wrong_in_the_crowd_is_seen(scripts: Callable[[str], ModuleType], tmp_path: Path) -> None:
    traffic = scripts("load_traffic")
    rows = np.eye(2, dtype=np.float32)
    np.savez(tmp_path / "truth.npz", documents=rows, queries=rows, reasoned=rows, scores=np.array([[0.5, 0.4]] * 2))
    (tmp_path / "truth.json").write_text(json.dumps({"documents": ["a", "b"], "queries": ["c", "d"], "budget": 3}))
    truth = traffic.Truth(tmp_path)
    answer: dict[str, Any] = {"data": [{"embedding": [0.0, 1.00005]}]}
    assert truth.embeddings("documents", [1], answer) is None
    answer["data"][0]["embedding"] = [0.0, 1.0003]
    assert "from the one computed alone" in truth.embeddings("documents", [1], answer)
    assert "from the one computed alone" in truth.embeddings("documents", [0], answer)
    assert truth.hits(0, {"hits": [{"score": 0.5}, {"score": 0.4}]}) is None
    assert "shape" in truth.hits(0, {"hits": [{"score": 0.5}]})
    tally = traffic.Tally()

    def given(status: int, **headers: str) -> Any:
        return scripts("serve_client").Answer(status, headers, b"{}", 0.1)

    assert tally.note("documents", given(200), (200,))
    assert not tally.note("not JSON", given(400), (400,))
    assert not tally.note("documents", given(429, **{"retry-after": "2"}), (200,))
    assert not tally.unexpected
    assert tally.without_retry_after == 0
    tally.note("documents", given(503), (200,))
    assert tally.without_retry_after == 1
    tally.note("documents", given(500), (200,))
    tally.note("not JSON", given(200), (400,))
    assert [line.split()[-2] for line in tally.unexpected] == ["500", "200"]
    tally.note("documents", None, ())
    assert tally.count(status=traffic.CUT) == 1
    assert tally.count(kinds=("documents",)) == 5


def test_a_stream_ends_with_its_result_its_pieces_put_together(scripts: Callable[[str], ModuleType]) -> None:
    result = scripts("load_traffic")._result

    def stream(*events: tuple[str, Any]) -> bytes:
        return "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events).encode()

    good = {"reasoning": {"text": "a b"}, "hits": []}
    assert result(stream(("reasoning", {"text": "a "}), ("reasoning", {"text": "b"}), ("result", good))) == good
    assert result(stream(("error", {"error": {"code": "shutting_down"}}))) is None
    with pytest.raises(ValueError, match="streamed pieces"):
        result(stream(("reasoning", {"text": "a "}), ("result", good)))
    with pytest.raises(ValueError, match="ended with error"):
        result(stream(("error", {"error": {"code": "internal"}})))
