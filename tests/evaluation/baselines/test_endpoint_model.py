"""A model behind an endpoint is measured like any other, pays for no text twice, and gives up only with a reason."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
from endpoint_server import KEY, EndpointServer, embed, embeddings, error, good

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.evaluation.baselines.endpoint_model import UNIT, EndpointEncoder
from search_r3.evaluation.baselines.external_models import CostApproval, ExternalModelConfig
from search_r3.evaluation.embedding_cache import EmbeddingCache
from search_r3.evaluation.measures import NDCG
from search_r3.evaluation.suite import evaluate_system, load_dataset
from search_r3.evaluation.systems import open_systems

pytestmark = pytest.mark.filterwarnings("ignore:.*documents have an empty")
TEXTS = [f"document {number} speaks of {('sea', 'moon', 'bread', 'yeast')[number % 4]}" for number in range(100)]


def encoder(url: str, approval: CostApproval | None = None, batch_size: int = UNIT, **options) -> EndpointEncoder:
    settings = {"key_variable": None, "backoff": 0.001, "concurrency": 1} | options
    return EndpointEncoder(ExternalModelConfig(model="m", endpoint=url, **settings), approval, batch_size)


def encode_all(asked: EndpointEncoder, cache: EmbeddingCache | None, texts: list[str] = TEXTS) -> np.ndarray:
    work = asked.plan(texts, "document", cache)
    asked.approve("m", [work])
    return asked.run(work, cache, show_progress=False)[0]


def expected(texts: list[str] = TEXTS) -> np.ndarray:
    rows = np.array([embed(text) for text in texts], dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_rows_are_the_texts_own_in_unit_length_whatever_the_batches_and_threads():
    with EndpointServer() as sent:
        for batch_size, concurrency in ((UNIT, 1), (7, 4), (1000, 3)):
            rows = encode_all(encoder(sent.url, batch_size=batch_size, concurrency=concurrency), None)
            assert rows == pytest.approx(expected(), abs=1e-6)
            assert max(len(request["input"]) for request in sent.requests) == min(batch_size, UNIT)
            sent.requests.clear()


def test_nothing_is_sent_twice_not_a_repeated_text_nor_one_that_an_interrupted_run_paid_for(tmp_path):
    cache, texts = EmbeddingCache(tmp_path), TEXTS + TEXTS[:10]
    broken = [True]
    with EndpointServer(lambda r, n: error(400, "no more") if broken[0] and n == 2 else good(r)) as sent:
        with pytest.raises(InputError, match="no more"):
            encode_all(encoder(sent.url), cache, texts)
        del sent.requests[2]  # it was refused, so nobody paid
        broken[0] = False
        assert encode_all(encoder(sent.url), cache, texts) == pytest.approx(expected(texts), abs=1e-6)
        assert sorted(sent.texts) == sorted(TEXTS)
        sent.requests.clear()
        encode_all(encoder(sent.url), cache, texts)
        assert sent.requests == []
        encode_all(encoder(sent.url), cache, [*TEXTS, "one more"])  # its unit is another one, the others are known
        assert len(sent.texts) == len(TEXTS) % UNIT + 1
        sent.requests.clear()
        other = EndpointEncoder(ExternalModelConfig(model="other", endpoint=sent.url, key_variable=None))
        encode_all(other, cache, TEXTS[:UNIT])
        assert len(sent.texts) == UNIT  # another model's embeddings are not taken for these


@pytest.mark.parametrize(
    "failure",
    [
        error(429, "slow down"),
        error(500),
        error(503),
        (200, {}, "{}"),
        (200, {"Content-Type": "text/html"}, "<html>"),
        (200, {}, '{"data": ['),
        (200, {}, '{"data": [{"index": 0, "embedding": [1.0]}]}'),
        (200, {}, '{"data": [{"index": 0, "embedding": [1.0]}, {"index": 0, "embedding": [2.0]}]}'),
        (200, {}, '{"data": [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}]}'),
        (200, {}, '{"data": [{"index": 0, "embedding": "AAAA"}, {"index": 1, "embedding": "AAAA"}]}'),
    ],
    ids=["429", "500", "503", "empty", "html", "cut", "too few", "same index", "ragged", "strings"],
)
def test_what_passes_is_tried_again(failure):
    def second_time_lucky(request, number):
        return failure if number == 1 else good(request)

    with EndpointServer(second_time_lucky) as sent:
        asked = encoder(sent.url, batch_size=2)
        assert encode_all(asked, None, TEXTS[:6]) == pytest.approx(expected(TEXTS[:6]), abs=1e-6)
        assert len(sent.requests) == 4


def test_a_retry_after_is_waited_for_and_a_very_long_one_is_told(monkeypatch):
    waits: list[float] = []

    class Recorded(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return super().wait(timeout)

    with EndpointServer(lambda r, n: error(429, **{"Retry-After": "0.3"}) if n == 0 else good(r)) as sent:
        monkeypatch.setattr(threading, "Event", Recorded)
        encode_all(encoder(sent.url), None, TEXTS[:2])
        assert max(waits) >= 0.29
    with (
        EndpointServer(lambda r, n: error(429, **{"Retry-After": "3600"})) as sent,
        pytest.raises(InputError, match="requires a wait of 3,600 seconds"),
    ):
        encode_all(encoder(sent.url), None, TEXTS[:2])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (error(401), "refused a call without a key"),
        (error(402), "no credit left"),
        (error(429, "insufficient_quota"), "no credit left"),
        (error(404), 'no model "m"'),
        (error(400, "maximum context length is 512 tokens"), "512 tokens.*max_characters"),
        ((200, {}, "{}"), "should the URL end in /v1"),
        ((200, {}, '{"data": [{"index": 0, "embedding": [NaN, 1.0]}]}'), "NaN"),
        ((200, {}, '{"data": [{"index": 0, "embedding": [null, 1.0]}]}'), "NaN"),
        ((200, {}, '{"data": [{"index": 0, "embedding": [0.0, 0.0]}]}'), "embedding of zeros for 'document 0"),
    ],
)
def test_what_does_not_pass_is_told_in_one_line(answer, message):
    with EndpointServer(lambda request, number: answer) as sent, pytest.raises(InputError, match=message) as caught:
        encode_all(encoder(sent.url, retries=2), None, TEXTS[:1])
    assert "\n" not in str(caught.value)
    assert len(sent.requests) <= 2


def test_a_server_that_stays_down_ends_the_run_and_what_came_is_kept(tmp_path):
    cache = EmbeddingCache(tmp_path)
    with EndpointServer(lambda r, n: good(r) if n == 0 else error(500)) as sent:
        with pytest.raises(InputError, match=r"failed after 3 tries, status 500.*same command resumes"):
            encode_all(encoder(sent.url, retries=2), cache)
        assert len(sent.requests) == 4
        assert encoder(sent.url).plan(TEXTS, "document", cache).texts == len(TEXTS) - UNIT
    with pytest.raises(InputError, match="cannot be reached"):
        encode_all(encoder("http://127.0.0.1:9/v1"), None, TEXTS[:1])
    with (
        EndpointServer(lambda r, n: (time.sleep(0.5), good(r))[1]) as sent,
        pytest.raises(InputError, match=r"within 0\.1 sec"),
    ):
        encode_all(encoder(sent.url, timeout=0.1, retries=1), None, TEXTS[:1])


def test_another_dimension_is_refused_between_calls_and_against_the_cache(tmp_path):
    with (
        EndpointServer(lambda r, n: embeddings(r, 64 + n)) as sent,
        pytest.raises(InputError, match="with 65 dimensions, but earlier with 64"),
    ):
        encode_all(encoder(sent.url), None)
    cache = EmbeddingCache(tmp_path)
    with EndpointServer(lambda r, n: embeddings(r, 64 + n)) as sent:
        encode_all(encoder(sent.url), cache, TEXTS[:UNIT])
        with pytest.raises(InputError, match=r"of 64 and of 65 .*move it away"):
            encode_all(encoder(sent.url), cache, TEXTS[: UNIT + 1])


def test_the_cost_is_told_first_and_too_much_needs_a_yes(monkeypatch):
    monkeypatch.setattr("search_r3.evaluation.baselines.endpoint_model.is_local", lambda url: False)
    lines: list[str] = []
    with EndpointServer() as sent:
        encode_all(encoder(sent.url, CostApproval(price=100.0, report=lines.append)), None, TEXTS[:2])
        assert lines[0] == "m: 2 documents to embed, about 13 tokens (characters / 4), under 0.01 at 100 per million"
        assert lines[1] == "texts: 1 calls, 10 tokens read, under 0.01 at 100 per million"
        sent.requests.clear()
        with pytest.raises(InputError, match=r"about 697 tokens .* over the limit of 600 tokens; pass --yes"):
            encode_all(encoder(sent.url, token_limit=600), None)
        with pytest.raises(InputError, match="nothing was sent"):
            encode_all(encoder(sent.url, CostApproval(ask=lambda line: False), token_limit=600), None)
        assert sent.requests == []
        asked: list[str] = []
        encode_all(encoder(sent.url, CostApproval(ask=lambda line: not asked.append(line)), token_limit=600), None)
        assert asked == ["m: 100 documents to embed, about 697 tokens (characters / 4). Send them?"]
        encode_all(encoder(sent.url, CostApproval(yes=True), token_limit=600), None)
        split = encoder(sent.url, token_limit=600)  # the limit is for the whole run, not for each data set
        encode_all(split, None, TEXTS[:60])
        with pytest.raises(InputError, match="over the limit"):
            encode_all(split, None, TEXTS[60:])


def test_what_this_machine_serves_needs_no_yes_unless_it_has_a_price():
    with EndpointServer() as sent:
        encode_all(encoder(sent.url, token_limit=1), None, TEXTS[:2])
        with pytest.raises(InputError, match="over the limit of 1 tokens"):
            encode_all(encoder(sent.url, token_limit=1, price=1.0), None, TEXTS[:2])


def test_an_evaluation_by_an_endpoint_end_to_end(data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with EndpointServer() as sent:
        system_file = tmp_path / "words.yaml"
        system_file.write_text(
            f"model: words\nendpoint: {sent.url}\nkey_variable: MY_KEY\nmax_characters: 60\n"
            'query_prompt: "Instruct: find what answers\\nQuery: "\n'
        )
        (system,) = open_systems(str(system_file), modes=["off"])
        cache, dataset = EmbeddingCache(tmp_path / "cache"), load_dataset("tiny", None, data_root)
        record, fresh = evaluate_system(dataset, "test", system, tmp_path / "results", cache)
        assert fresh
        assert record["system"] == "words"
        assert record["measures"][NDCG] > 0.8
        assert record["hardware"] == "behind an endpoint, not known"
        assert record["num_empty_documents"] == 1
        assert "" not in sent.texts
        assert "Instruct: find what answers\nQuery: why does bread rise" in sent.texts
        assert "Yeast makes bread rise." in sent.texts  # documents are not prompted
        assert max(map(len, sent.texts)) == 60
        assert set(sent.keys) == {f"Bearer {KEY}"}
        sent.requests.clear()
        again, _ = evaluate_system(dataset, "test", system, tmp_path / "results", cache, force=True)
        assert again["measures"] == record["measures"]
        assert again["seconds"]["documents"] == record["seconds"]["documents"]
        assert sent.requests == []
    written = "".join(path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in written
    assert sent.url not in json.dumps(record["settings"])


def test_the_command_line_refuses_what_nobody_said_yes_to_and_takes_a_yes(tmp_path, data_root, monkeypatch, capsys):
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with EndpointServer() as sent:
        (tmp_path / "words.yaml").write_text(
            f"model: words\nendpoint: {sent.url}\nkey_variable: null\ntoken_limit: 9\nprice: 0.5\n"
        )
        command = ["evaluate", "--dataset", "tiny", "--data", str(data_root), "--system", "words.yaml", "--json"]
        assert main(command) == 2
        assert "pass --yes to send them" in capsys.readouterr().err
        assert sent.requests == []
        assert main([*command, "--yes", "--price", "2"]) == 0
        told = capsys.readouterr()
        assert "3 documents and 3 queries to embed, about" in told.err
        assert "under 0.01 at 2 per million" in told.err
        assert json.loads(told.out)[0]["system"] == "words"
    assert main(["evaluate", "suite.yaml", "--yes"]) == 2
    assert "token_limit" in capsys.readouterr().err


def test_a_key_never_stands_in_an_error(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with (
        EndpointServer(lambda r, n: error(401, f"bad key {KEY}")) as sent,
        pytest.raises(InputError, match="refused the key in MY_KEY") as caught,
    ):
        encode_all(encoder(sent.url, key_variable="MY_KEY"), None, TEXTS[:1])
    assert KEY not in str(caught.value)
    with (
        EndpointServer(lambda r, n: error(400, f"bad key {KEY}")) as sent,
        pytest.raises(InputError, match="bad key") as caught,
    ):
        encode_all(encoder(sent.url, key_variable="MY_KEY"), None, TEXTS[:1])
    assert KEY not in str(caught.value)


def test_after_ctrl_c_the_calls_under_way_are_kept(tmp_path, monkeypatch):
    cache, lines = EmbeddingCache(tmp_path), []

    def slow(request, number):
        time.sleep(0.2)
        return good(request)

    monkeypatch.setattr("search_r3.evaluation.baselines.endpoint_model.progress_bar", lambda *_: Interrupting())
    with EndpointServer(slow) as sent:
        asked = encoder(sent.url, CostApproval(report=lines.append), concurrency=2)
        with pytest.raises(KeyboardInterrupt):
            asked.run(asked.plan(TEXTS, "document", cache), cache)
        assert "waiting for running calls" in lines[0]
        kept = len(TEXTS) - asked.plan(TEXTS, "document", cache).texts
        assert kept == len(sent.texts) < len(TEXTS)


class Interrupting:
    """A progress bar at whose first step somebody presses Ctrl-C."""

    def __enter__(self):
        def advance(count: int) -> None:
            raise KeyboardInterrupt

        return advance

    def __exit__(self, *_):
        return None


def body(value, status: int = 200) -> tuple[int, dict[str, str], str]:
    return status, {}, value if isinstance(value, str) else json.dumps(value)


ERRORS = {
    "an object": ({"error": {"message": "the model is loading", "type": "x"}}, "an error: the model is loading"),
    "a text": ({"error": "out of memory"}, "an error: out of memory"),
    "with a code": (
        {"error": {"message": "upstream is down", "code": 502}},
        r"an error \(code 502\): upstream is down",
    ),
    "FastAPI's": ({"detail": "no worker is free"}, "an error: no worker is free"),
    "vLLM's": ({"object": "error", "message": "bad weights", "code": 500}, r"an error \(code 500\): bad weights"),
    "a name as a code": ({"error": {"message": "no such model", "code": "model_not_found"}}, "an error: no such model"),
    "beside null": ({"data": None, "error": {"message": "quota reached"}}, "an error: quota reached"),
    "beside nothing": ({"object": "list", "data": [], "error": "queue is full"}, "an error: queue is full"),
}


@pytest.mark.parametrize(("answer", "said"), ERRORS.values(), ids=ERRORS.keys())
def test_an_error_in_an_answer_of_status_200_is_told_in_the_endpoints_words(answer, said):
    expected = pytest.raises(InputError, match=f"answers with {said}")
    with EndpointServer(lambda r, n: body(answer)) as sent, expected as caught:
        encode_all(encoder(sent.url, retries=2), None)
    assert "NoneType" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_such_an_error_that_passes_is_waited_for():
    def busy(request, number):
        return body({"error": {"message": "busy", "code": 503}}) if number in (1, 2, 3) else good(request)

    with EndpointServer(busy) as sent:
        assert encode_all(encoder(sent.url, retries=3), None) == pytest.approx(expected(), abs=1e-6)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (401, "refused a call without a key"),
        (404, 'has no model "m"'),
        ("402", "no credit left"),
        (400, r"refused a text \(status 400\): no"),
    ],
)
def test_such_an_error_that_stays_is_not_asked_again(code, said):
    with EndpointServer(lambda r, n: body({"error": {"message": "no", "code": code}})) as sent:
        with pytest.raises(InputError, match=said):
            encode_all(encoder(sent.url), None, TEXTS[:UNIT])
        assert len(sent.requests) == 1


NONE = {
    "a page": (body("<html>hello</html>"), "not JSON but begins '<html>hello</html>'"),
    "null": (body({"data": None}), 'it has no "data"'),
    "nothing": (body({}), 'it has no "data"'),
    "a number": (body({"data": 7}), "its \"data\" is '7'"),
    "an empty list": (body({"data": []}), 'its "data" is'),
    "texts": (body({"data": ["a"] * UNIT}), "has no list of numbers"),
    "null rows": (body({"data": [{"index": i, "embedding": None} for i in range(UNIT)]}), "has no list of numbers"),
}


@pytest.mark.parametrize(("answer", "said"), NONE.values(), ids=NONE.keys())
def test_what_is_no_embedding_is_described_and_no_python_error_is_shown(answer, said):
    expected = pytest.raises(InputError, match="does not answer with embeddings")
    with EndpointServer(lambda r, n: answer) as sent, expected as caught:
        encode_all(encoder(sent.url, retries=1), None)
    assert said in str(caught.value)
    assert "object" not in str(caught.value)
