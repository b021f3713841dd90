"""The llama.cpp engine gives float32's embeddings to rounding, whatever the batch, and ends rows where torch does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import run
from token_rows import distance, token_rows

pytest.importorskip("xllamacpp", reason="no llama.cpp: pip install 'search-r3[llama-cpp]'")
from search_r3 import InputError, SearchR3
from search_r3.cli import main
from search_r3.model.concurrent_reasoning import ConcurrentReasoning
from search_r3.model.engines.llama_cpp import llama_cpp_engine, llama_server
from search_r3.model.engines.registry import FASTEST_ENGINES, LLAMA_CPP

NEAR = LLAMA_CPP.golden_tolerance
PREFIX = [5, 60, 7, 80, 9]
TEXTS = ["How do I read a file line by line in Python?", "Paris", "what does <|embed_token|> do, and <|im_end|>"]
SNOWMAN = "☃"
"""A character of three tokens, none of which is text by itself."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEARCH_R3_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model(tiny_model: Path, cache: Path) -> Any:
    found = SearchR3.from_pretrained(tiny_model, engine="llama.cpp")
    yield found
    found.engine.close()


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> SearchR3:
    return SearchR3.from_pretrained(tiny_model, device="cpu", engine="torch")


@pytest.fixture
def rows() -> list[list[int]]:
    """More rows than llama.cpp runs at once, of mixed lengths, no special token among them."""
    return token_rows(3, 9, 1, 27, 4, 600, 14, 2, 40, 6, 8, 11)


def generate(engine: Any, rows: list[list[int]], **changes: Any) -> Any:
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0, "batch_size": 32}
    return engine.generate(PREFIX, rows, **settings | changes)


def test_every_row_of_a_batch_is_near_float32_and_of_unit_length(
    model: SearchR3, reference: SearchR3, rows: list[list[int]]
) -> None:
    """Also one of more tokens than a pass takes; llama.cpp has cut such rows without a word."""
    seen: list[int] = []
    found = model.engine.embed(PREFIX, rows, 5, seen.append)
    assert distance(found, reference.engine.embed(PREFIX, rows)) < NEAR
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert found.dtype == np.float32
    assert sum(seen) == len(rows)
    assert distance(found, model.engine.embed(PREFIX, rows, 1)) < NEAR
    assert distance(found, model.engine.embed([], [PREFIX + row for row in rows])) < NEAR


def test_texts_are_plain_characters_and_golden_vectors_are_near(model: SearchR3, reference: SearchR3) -> None:
    assert distance(model.encode_document(TEXTS), reference.encode_document(TEXTS)) < NEAR
    direct = [one.encode_query(TEXTS, reasoning=False) for one in (model, reference)]
    assert distance(*direct) < NEAR
    assert (model.dtype, model.contract_hash) == ("q8_0", reference.contract_hash)


def test_a_row_longer_than_the_context_is_run_alone_and_one_that_the_model_does_not_read_is_refused(
    model: SearchR3, reference: SearchR3, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [[20 + i % 300 for i in range(length)] for length in (200, 3, 90)]
    monkeypatch.setattr(model.engine, "_context", 64)
    assert distance(model.engine.embed(PREFIX, long), reference.engine.embed(PREFIX, long)) < NEAR
    written = generate(model.engine, long)
    whole = [[*row, *one.token_ids, model.engine.embed_id] for row, one in zip(long, written, strict=True)]
    assert distance([one.embedding for one in written], reference.engine.embed(PREFIX, whole)) < NEAR
    with pytest.raises(
        InputError, match=r"^a row of 1105 tokens is too long for this model, which reads fewer than 1024"
    ):
        model.engine.embed(PREFIX, [[20] * 1100])
    with pytest.raises(InputError, match=r"too long for this model"):
        model.engine.continuous_batch(PREFIX).join([[20], [20] * 1100], [1, 1])


def test_the_embedding_is_the_state_at_the_embed_token_behind_what_was_written(
    model: SearchR3, reference: SearchR3, rows: list[list[int]]
) -> None:
    told: dict[int, list[int]] = {}
    seen: list[int] = []
    budgets = [index % 5 for index in range(len(rows))]
    written = generate(
        model.engine,
        rows,
        max_new_tokens=budgets,
        progress=seen.append,
        on_token=lambda index, token: told.setdefault(index, []).append(token),
    )
    whole = [[*row, *one.token_ids, model.engine.embed_id] for row, one in zip(rows, written, strict=True)]
    assert distance([one.embedding for one in written], reference.engine.embed(PREFIX, whole)) < NEAR
    assert [told.get(index, []) for index in range(len(rows))] == [one.token_ids for one in written]
    assert all(len(one.token_ids) <= budget for one, budget in zip(written, budgets, strict=True))
    assert all(one.forced for one in written if one.ended is None and len(one.token_ids) < 5)
    assert sum(seen) == len(rows)


class TestGenerate:
    """What a server streams, and what becomes of it: `_post` is replaced, so that the tokens are known."""

    @pytest.fixture
    def script(self, model: SearchR3, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int], set[int]], list[Any]]:
        """Let llama.cpp "write" these tokens, streaming nothing for those in the set; returns the requests."""
        import io
        import json
        from contextlib import contextmanager

        class Response(io.BytesIO):
            status = 200

        def write(tokens: list[int], hidden: set[int]) -> list[Any]:
            requests: list[Any] = []

            @contextmanager
            def post(path: str, body: Any) -> Any:
                if path != "/completion":
                    with real(path, body) as response:
                        yield response
                    return
                begin = len(body["prompt"]) - len(PREFIX) - 1
                new = tokens[begin : begin + body["n_predict"]]
                requests.append((begin, len(new), body.get("stream", False)))
                if not body.get("stream"):
                    yield Response(json.dumps({"tokens": new}).encode())
                    return
                events = [
                    {"tokens": [token], "tokens_predicted": n} for n, token in enumerate(new, 1) if token not in hidden
                ]
                events.append({"tokens": [], "tokens_predicted": len(new), "stop": True})
                yield Response(b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in events))

            real = model.engine._server._post
            monkeypatch.setattr(model.engine._server, "_post", post)
            return requests

        return write

    def test_tokens_within_a_character_which_are_not_streamed_are_asked_for(
        self, model: SearchR3, script: Callable[[list[int], set[int]], list[Any]]
    ) -> None:
        requests = script([30, 31, 32, 33, 34, 35, 36], {31, 32})
        (found,) = generate(model.engine, [[20]], max_new_tokens=5)
        assert found.token_ids == [30, 31, 32, 33, 34]
        assert (found.forced, found.ended) == (True, None)
        assert requests == [(0, 6, True), (1, 3, False), (4, 2, True)]

    def test_a_character_that_the_budget_cuts_is_kept(
        self, model: SearchR3, script: Callable[[list[int], set[int]], list[Any]]
    ) -> None:
        script([30, 31, 32], {31, 32})
        (found,) = generate(model.engine, [[20]], max_new_tokens=2)
        assert (found.token_ids, found.forced) == ([30, 31], True)

    @pytest.mark.parametrize(("last", "forced", "ended"), [("embed", False, None), ("stop", True, 1)])
    def test_the_embed_token_and_the_end_of_the_turn_end_a_row(
        self,
        model: SearchR3,
        script: Callable[[list[int], set[int]], list[Any]],
        last: str,
        forced: bool,
        ended: int | None,
    ) -> None:
        assert model.tokenizer.convert_tokens_to_ids("<|im_end|>") == 1
        end = model.engine.embed_id if last == "embed" else 1
        script([30, 31, end, 33, 34, 35, 36], set())
        (found,) = generate(model.engine, [[20]])
        assert (found.token_ids, found.forced, found.ended) == ([30, 31], forced, ended)
        (empty,) = generate(model.engine, [[20]], max_new_tokens=0)
        assert (empty.token_ids, empty.forced, empty.ended) == ([], True, None)


def test_a_character_of_several_tokens_has_all_of_them(model: SearchR3) -> None:
    """By llama.cpp itself: a prompt of snowmen makes no promise, so what was streamed is held against one answer."""
    server = model.engine._server
    prompt = [*PREFIX, *model.token_rows([SNOWMAN * 4])[0][:-1]]
    assert len(model.token_rows([SNOWMAN])[0]) == 3
    streamed = list(server.generate(prompt, 12, ()))
    body = {"prompt": prompt, "n_predict": 12, "temperature": 0, "return_tokens": True, "samplers": ["temperature"]}
    with server._post("/completion", body) as response:
        whole = llama_server._checked(response)["tokens"]
    assert streamed == whole
    assert len(streamed) == 12


def test_samples_depend_on_their_seed(model: SearchR3) -> None:
    rows = [[20, 21, 22]]
    first, second, again = (generate(model.engine, rows, temperature=1.0, seed=seed, samples=2) for seed in (3, 4, 3))
    ids = [[one.token_ids for one in found] for found in (first, second, again)]
    assert ids[0] == ids[2] != ids[1]
    assert ids[0][0] != ids[0][1]


def test_queries_join_and_leave_between_tokens(model: SearchR3) -> None:
    alone = model.reason(TEXTS, max_reasoning_tokens=5)
    running = ConcurrentReasoning(model)
    first = running.join(TEXTS[:1], [5])
    done: dict[int, Any] = {}
    tokens: dict[int, list[int]] = {}
    joined = [*first, *running.join(TEXTS[1:], [5, 5])]
    running.leave(running.join(["another"], [200]))
    while len(running):
        for step in running.step():
            if step.reasoned is not None:
                done[step.handle] = step.reasoned
            else:
                tokens.setdefault(step.handle, []).append(step.token)
    assert list(done.keys() - set(joined)) == []
    for handle, expected in zip(joined, alone, strict=True):
        assert done[handle].reasoning_ids == expected.reasoning_ids == tokens.get(handle, [])
    assert distance([done[handle].embedding for handle in joined], [one.embedding for one in alone]) < NEAR


def test_an_error_comes_out_and_the_engine_goes_on(model: SearchR3) -> None:
    def fail(index: int, token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model.engine, [[20]] * 3, on_token=fail)
    with pytest.raises(InputError, match=r"^llama.cpp rejects this: Prompt contains invalid tokens$"):
        generate(model.engine, [[20], [10**6]])
    assert len(generate(model.engine, [[20]])) == 1


def test_the_file_is_cached_and_a_damaged_one_is_written_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path))
    written: list[Path] = []
    write = llama_cpp_engine.write_gguf
    monkeypatch.setattr(
        llama_cpp_engine, "write_gguf", lambda path, *args, **more: (written.append(path), write(path, *args, **more))
    )

    def embed() -> np.ndarray:
        model = SearchR3.from_pretrained(tiny_model, engine="llama.cpp")
        found = model.encode_document(TEXTS)
        model.engine.close()
        return found

    first = embed()
    (file,) = (tmp_path / "llama.cpp").glob("*.gguf")
    assert distance(first, embed()) < 1e-5
    assert written == [file]
    file.write_bytes(file.read_bytes()[:-1000])
    assert distance(first, embed()) < 1e-5
    assert written == [file, file]
    (tmp_path / "none").write_text("a file, not a folder")
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "none" / "cache"))
    assert distance(first, embed()) < 1e-5, "without a cache"


def test_both_sides_of_a_query_adapter_are_run(
    make_tiny_model: Callable[..., Path],
    save_adapter: Callable[..., Path],
    save_query_adapter: Callable[..., Path],
    tmp_path: Path,
    cache: Path,
) -> None:
    adapter = save_adapter(make_tiny_model(tmp_path / "base"), tmp_path / "adapter")
    query_adapter = save_query_adapter(adapter, tmp_path / "queries")
    model, plain = (
        SearchR3.from_pretrained(query_adapter, engine=name, device="cpu") for name in ("llama.cpp", "torch")
    )
    assert distance(model.encode_document(TEXTS), plain.encode_document(TEXTS)) < NEAR
    assert distance(*(one.encode_query(TEXTS, reasoning=False) for one in (model, plain))) < NEAR
    for side in (model, model.documents):
        side.engine.close()


def test_it_is_chosen_as_the_fastest_where_int8_does_not_run(
    tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert FASTEST_ENGINES == ("int8", "llama.cpp", "torch")
    refused = {"int8"}
    opened = SearchR3.open_engine

    def open_engine(self: SearchR3, spec: Any, *more: Any) -> Any:
        if spec.name in refused:
            raise InputError(f"engine {spec.name} does not run here")
        return opened(self, spec, *more)

    monkeypatch.setattr(SearchR3, "open_engine", open_engine)
    model = SearchR3.from_pretrained(tiny_model, engine="fastest", device="cpu")
    assert model.engine_spec.name == "llama.cpp"
    model.engine.close()
    refused.add("llama.cpp")
    assert SearchR3.from_pretrained(tiny_model, engine="fastest").engine_spec.name == "torch"
    assert SearchR3.from_pretrained(tiny_model).engine_spec.name == "torch", "auto"


def test_what_it_does_not_run_is_one_line(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    xllamacpp = llama_server.import_xllamacpp()
    with pytest.raises(
        InputError, match=r"^engine llama.cpp is made from float32 weights on a cpu, not bfloat16 on cpu"
    ):
        SearchR3.from_pretrained(tiny_model, engine="llama.cpp", dtype="bfloat16")
    with monkeypatch.context() as patched:
        patched.setattr(xllamacpp, "get_system_info", lambda: "CPU : AVX2 = 1 | AMX_INT8 = 1 | ")
        assert main(["models", "--check", str(tiny_model), "--engine", "llama.cpp"]) == 2
        assert "error: this build of llama.cpp has AMX switched on" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(InputError, match=r"pip install .*'search-r3\[llama-cpp\]'$"):
        SearchR3.from_pretrained(tiny_model, engine="llama.cpp")


def test_nobody_else_can_ask_it(model: SearchR3) -> None:
    """It listens on the loopback interface, with a key."""
    import http.client

    address = model.engine._server._address
    assert address.hostname == "127.0.0.1"
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    connection.request("POST", "/v1/embeddings", '{"input": "x"}', {"Authorization": "Bearer guess"})
    assert connection.getresponse().status == 401
    connection.close()


def test_a_server_that_is_closed_at_once_ends(model: SearchR3) -> None:
    """Several times, as it is a race: xllamacpp waits for ever for a loop that it told to end before it began."""
    for _ in range(20):
        llama_server.LlamaServer(model.engine._path, sequences=1, context=64, threads=1).close()


def test_a_program_that_closes_nothing_ends(tiny_model: Path, cache: Path) -> None:
    """And writes nothing but what it prints."""
    code = (
        "from search_r3 import SearchR3\n"
        f"model = SearchR3.from_pretrained({str(tiny_model)!r}, engine='llama.cpp')\n"
        "print(model.encode_document(['x']).shape)"
    )
    done = run([sys.executable, "-c", code])
    assert done.stdout == "(1, 32)\n"
    assert "llama" not in done.stderr
