"""An index made by a real Ray cluster of this machine: equal to the local one, whatever dies on the way.

Workers are processes of their own, with a tiny random model or an encoder that hashes words.
"""

from __future__ import annotations

import errno
import inspect
import itertools
import json
import os
import re
import signal
import socket
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lancedb.index import BTree

from search_r3 import SearchR3
from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, build_index, open_source, update_documents
from search_r3.index.row_keys import ROW_HASH, VECTOR
from search_r3.index.storage.location import Remote, options_of
from search_r3.index.storage.object_store import open_objects

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'search-r3[ray]'")
lance = pytest.importorskip("lance", reason="Lance is not installed: pip install 'search-r3[ray]'")
pytest.importorskip("lance_ray", reason="lance-ray is not installed: pip install 'search-r3[ray]'")

from search_r3.index.distributed import Cluster, ModelSource, build_distributed  # noqa: E402
from search_r3.index.distributed.cluster import _start, cause_of  # noqa: E402
from search_r3.index.distributed.commit import Fragments, check_fragments, commit_fragments  # noqa: E402


@pytest.fixture(scope="module")
def cluster():
    """Two workers, and a third CPU for what reads and writes; tests hand their functions over by value."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=3, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    yield Cluster("local", workers=2)
    ray.shutdown()


@pytest.fixture
def one_worker(cluster) -> Cluster:
    """For what does not depend on how the work is shared out: each worker takes seconds to start."""
    return replace(cluster, workers=1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """48 docstrings of the standard library, with two fields of metadata, one of them not everywhere."""
    lines = []
    for module in (textwrap, json, re, threading, inspect):
        for name, value in sorted(vars(module).items()):
            text = (inspect.getdoc(value) or "")[:500] if inspect.isroutine(value) else ""
            if text and len(lines) < 48:
                fields = {"id": f"{module.__name__}.{name}", "title": name, "text": text, "length": len(text)}
                lines.append(fields | ({"module": module.__name__} if len(lines) % 3 else {}))
    assert len(lines) == 48
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Watched:
    """A way to get a model that notes its process in a folder whenever it embeds, and takes its time over it."""

    def __init__(self, load, log: Path, seconds: float) -> None:
        self.load, self.log, self.seconds = load, log, seconds

    def __call__(self):
        model = self.load()
        encode = model.encode_document

        def slow(texts, **options):
            (self.log / f"{os.getpid()}-{time.time_ns()}").touch()
            time.sleep(self.seconds)
            return encode(texts, **options)

        model.encode_document = slow
        return model


class Fake:
    """Like `FakeEncoder` of the other tests, importable by a worker; `wrong` spoils it."""

    name, contract_hash, dimension, source = "fake", "a" * 64, 64, "fake"

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong

    def encode_document(self, texts, *, batch_size=32, show_progress_bar=None, max_length=None):
        matrix = np.full((len(texts), self.dimension), 1e-3, dtype=np.float32)
        for row, text in zip(matrix, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[sum(word.encode()) % self.dimension] += 1
        if self.wrong == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/part")
        return matrix / np.linalg.norm(matrix, axis=1, keepdims=True) * (np.nan if self.wrong == "nan" else 1)

    def encode_query(self, texts, *, reasoning=True, max_reasoning_tokens=32, batch_size=32):
        return self.encode_document(texts)


class Changing:
    """A way to get a model that is another one each time after the first: machines that hold different files."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __call__(self):
        model = Fake()
        if self.marker.exists():
            model.contract_hash = "b" * 64
        self.marker.touch()
        return model


def rows_of(path) -> dict[str, dict]:
    """The rows by id; an id that is there twice is an error."""
    rows = SearchIndex.open(path).table.search().to_arrow().to_pylist()
    ids = [row["id"] for row in rows]
    assert len(ids) == len(set(ids)), "an id is there twice"
    return dict(zip(ids, rows, strict=True))


def check_equal(found: dict[str, dict], expected: dict[str, dict]) -> None:
    """The same ids, the same values in every column, and vectors to 1e-4."""
    assert found.keys() == expected.keys()
    for name, row in expected.items():
        np.testing.assert_allclose(found[name].pop(VECTOR), row.pop(VECTOR), atol=1e-4)
        assert found[name] == row


def counts_by_version(path) -> list[int]:
    """How many rows each version of the table has, oldest first."""
    uri, options = f"{path}/chunks.lance", options_of(path)
    versions = [held["version"] for held in lance.dataset(uri, storage_options=options).versions()]
    return [lance.dataset(uri, version=version, storage_options=options).count_rows() for version in versions]


def kill_one_midway(log: Path, killed: list[int]) -> None:
    """As soon as a worker is at its second batch, end it as the operating system would."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not killed:
        calls = [int(file.name.split("-")[0]) for file in log.iterdir()]
        busy = [pid for pid in calls if calls.count(pid) >= 2]
        if busy:
            os.kill(busy[0], signal.SIGKILL)
            killed.append(busy[0])
        time.sleep(0.02)


@pytest.mark.nightly
def test_the_cluster_has_a_cpu_more_than_workers(cluster):
    """First, so that the time Ray takes to start on a busy machine is not part of another test's limit."""
    assert ray.cluster_resources()["CPU"] == cluster.workers + 1


@pytest.mark.nightly
def test_long_texts_are_cut_by_the_models_tokens_as_in_a_local_build(one_worker, tiny_model, tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text(
        "".join(json.dumps({"id": f"p#{i}", "text": "0.4817,12.903," * 50 * i}) + "\n" for i in range(1, 5))
    )
    report = build_distributed(tmp_path / "many", open_source(path), ModelSource(str(tiny_model), "cpu"), one_worker)
    model = SearchR3.from_pretrained(str(tiny_model), device="cpu")
    local = build_index(tmp_path / "one", open_source(path), model, progress=False)
    assert report.added == local.added > 4
    found = rows_of(tmp_path / "many")
    assert max(model.count_tokens([row["r3_content"] for row in found.values()])) <= 512
    check_equal(found, rows_of(tmp_path / "one"))


@pytest.mark.nightly
def test_a_worker_killed_midway_costs_nothing(cluster, corpus, tiny_model, tmp_path, monkeypatch):
    """Each id once, everything as the local build has it, in one commit; and the index opens as any other."""
    monkeypatch.setattr("search_r3.index.build.build_run.cleanup_old_versions", lambda *_: None)
    log = tmp_path / "calls"
    log.mkdir()
    killed: list[int] = []
    killer = threading.Thread(target=kill_one_midway, args=(log, killed), daemon=True)
    killer.start()
    load = Watched(ModelSource(str(tiny_model), device="cpu"), log, 0.4)
    report = build_distributed(tmp_path / "many", open_source(corpus), load, cluster, part_rows=4, file_rows=16)
    killer.join(100)
    workers = {int(file.name.split("-")[0]) for file in log.iterdir()}
    assert killed
    assert workers > set(killed)
    assert os.getpid() not in workers

    model = SearchR3.from_pretrained(str(tiny_model), device="cpu")
    local = build_index(tmp_path / "one", open_source(corpus), model, progress=False)
    assert (
        (report.added, report.documents, report.embedded)
        == (48, 48, 48)
        == (
            local.added,
            local.documents,
            local.embedded,
        )
    )
    assert set(counts_by_version(tmp_path / "many")) == {0, 48}
    assert sorted(item.name for item in (tmp_path / "many").iterdir()) == sorted(
        item.name for item in (tmp_path / "one").iterdir()
    )
    check_equal(rows_of(tmp_path / "many"), rows_of(tmp_path / "one"))
    ours, theirs = SearchIndex.open(tmp_path / "many"), SearchIndex.open(tmp_path / "one")
    assert ours.complete
    assert {**vars(ours.info), "created": ""} == {**vars(theirs.info), "created": ""}
    for mode in ("vector", "text", "hybrid"):
        hits = [
            [hit.id for hit in index.search("wrap a paragraph of text", model, mode=mode, reasoning=False).hits]
            for index in (ours, theirs)
        ]
        assert hits[0] == hits[1]


@pytest.mark.nightly
def test_an_update_changes_what_the_local_one_would(cluster, corpus, tmp_path, monkeypatch):
    """New and changed rows come, and the rows they stand in for go, in one commit; what is gone is pruned."""
    lines = corpus.read_text().splitlines()
    changed = json.loads(lines[5])
    moved = json.loads(lines[6])
    lines[5] = json.dumps(changed | {"text": changed["text"] + " Changed."})
    lines[6] = json.dumps(moved | {"length": 1.0})  # the same text: its vector is not made again
    lines[7] = json.dumps({"id": "new", "text": "Something new.", "colour": "blue"})
    later = tmp_path / corpus.name
    later.write_text("\n".join(lines))
    reports = []
    for name, make in (
        ("many", lambda path, source: build_distributed(path, source, Fake, cluster, source="docs")),
        ("one", lambda path, source: build_index(path, source, Fake(), progress=False, source="docs")),
    ):
        make(tmp_path / name, open_source(corpus))
        monkeypatch.setattr("search_r3.index.build.build_run.cleanup_old_versions", lambda *_: None)
        reports.append(make(tmp_path / name, open_source(later)))
        monkeypatch.undo()
    for field in ("documents", "added", "updated", "unchanged", "removed", "embedded"):
        assert getattr(reports[0], field) == getattr(reports[1], field), field
    assert (reports[0].added, reports[0].updated, reports[0].unchanged, reports[0].embedded) == (1, 2, 45, 2)
    check_equal(rows_of(tmp_path / "many"), rows_of(tmp_path / "one"))
    counts = [count for count, _ in itertools.groupby(counts_by_version(tmp_path / "many"))]
    assert counts == [48, 49, 48], "one commit with all that came, then the document that is gone"


@pytest.mark.nightly
def test_sources_and_types_are_those_of_the_local_build(cluster, tmp_path):
    """Folders of equal file names, a posted document, records in conflict, a column widened, another made text."""
    for name in ("a/notes", "b/notes"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "README.md").write_text(f"What is in {name}.\n")
    records = tmp_path / "docs.jsonl"
    lines = [
        {"id": "README.md", "text": "not the file"},
        {"id": "big", "text": "a number", "n": 2**53 + 1, "year": 2020},
        {"id": "none", "text": "no number", "n": 1, "year": "unknown"},
    ]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fractions = tmp_path / "fractions.jsonl"
    fractions.write_text(json.dumps({"id": "half", "text": "a half", "share": 0.5}) + "\n")
    whole = [SourceDocument("posted", "", "said by a client", {"share": 7})]
    found = []
    for name, build in (
        ("many", lambda *given, **options: build_distributed(*given, Fake, cluster, **options)),
        ("one", lambda *given, **options: build_index(*given, Fake(), progress=False, **options)),
    ):
        index = tmp_path / name
        build(index, open_source(tmp_path / "a/notes"))
        update_documents(index, whole, Fake())
        reports = [
            build(index, open_source(place), types={"year": "text"} if place == records else None)
            for place in (tmp_path / "b/notes", records, fractions, tmp_path / "a/notes")
        ]
        assert [[left.path for left in report.conflicts] for report in reports] == [[], ["README.md"], [], []]
        assert sum(report.removed for report in reports) == 0
        rows = rows_of(index)
        assert rows["big"]["n"] == 2**53 + 1
        assert [rows[one]["year"] for one in ("big", "none")] == ["2020", "unknown"]
        assert [rows[one]["share"] for one in ("half", "posted")] == [0.5, 7.0]
        assert SearchIndex.open(index).columns["n"] == "integer"
        assert SearchIndex.open(index).table.schema.field("year").metadata == {b"r3_type": b"text"}
        (tmp_path / "b/notes/README.md").rename(tmp_path / "b/notes/other.md")
        kept = build(index, open_source(tmp_path / "b/notes"), may_prune=lambda removal: False)
        assert (kept.removed, kept.kept.documents) == (0, 1)
        (tmp_path / "b/notes/other.md").rename(tmp_path / "b/notes/README.md")
        found.append((rows, SearchIndex.open(index).sources))
    check_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert len(found[0][1]) == 5


def test_a_fragment_comes_back_from_json_as_it_was(corpus, tmp_path):
    """A worker hands on what it wrote as text; nothing of it is code."""
    build_index(tmp_path / "index", open_source(corpus), Fake(), progress=False)
    fragments = lance.dataset(str(tmp_path / "index" / "chunks.lance")).get_fragments()
    sink = Fragments(tmp_path / "index", lance.dataset(str(tmp_path / "index" / "chunks.lance")).schema, 1000)
    sink.on_write_complete(SimpleNamespace(write_returns=[[json.dumps(one.metadata.to_json()) for one in fragments]]))
    assert [one.physical_rows for one in sink.fragments] == [one.physical_rows for one in fragments]
    assert [one.files for one in sink.fragments] == [one.metadata.files for one in fragments]


@pytest.mark.nightly
def test_what_cannot_be_done_is_one_line_and_changes_nothing(cluster, corpus, tmp_path):
    source = open_source(corpus)
    with pytest.raises(InputError, match=r'NaN or infinite values for "'):
        build_distributed(tmp_path / "nan", source, lambda: Fake("nan"), cluster)
    assert len(SearchIndex.open(tmp_path / "nan")) == 0
    with pytest.raises(InputError, match=r"a worker on .* has no space left on its disk \(.*/data/part"):
        build_distributed(tmp_path / "full", source, lambda: Fake("full"), cluster)
    with pytest.raises(InputError, match=r"a worker loaded fake with contract bbbbbbbbbbbb.*aaaaaaaaaaaa"):
        build_distributed(tmp_path / "other", source, Changing(tmp_path / "loaded"), cluster)
    broken = tmp_path / "broken.jsonl"
    broken.write_text(corpus.read_text() + '{"id": "x"\n')
    with pytest.raises(InputError, match="line 49"):
        build_distributed(tmp_path / "broken", open_source(broken), Fake, cluster)
    assert not (tmp_path / "broken").exists()
    with pytest.raises(InputError, match=r"5 workers need 6 CPUs.*lower --workers"):
        build_distributed(tmp_path / "few", source, Fake, Cluster("local", workers=5))


@pytest.mark.nightly
def test_workers_write_to_object_storage_in_one_commit_too(cluster, corpus, s3_server, tmp_path, monkeypatch):
    """The options reach the workers, whose environment knows nothing of this server."""
    monkeypatch.setattr("search_r3.index.build.build_run.cleanup_old_versions", lambda *_: None)
    options = {
        "aws_access_key_id": "key",
        "aws_secret_access_key": "secret",
        "aws_region": "us-east-1",
        "aws_endpoint": s3_server,
        "allow_http": "true",
    }
    place = Remote("s3://bucket/many", options)
    report = build_distributed(place, open_source(corpus), Fake, cluster)
    assert (report.added, report.embedded) == (48, 48)
    assert set(counts_by_version(place)) == {0, 48}
    build_index(tmp_path / "one", open_source(corpus), Fake(), progress=False)
    check_equal(rows_of(place), rows_of(tmp_path / "one"))
    hits = [
        SearchIndex.open(path).search("wrap text", Fake(), reasoning=False).hits for path in (place, tmp_path / "one")
    ]
    assert hits[0] == hits[1]


@pytest.mark.nightly
def test_the_environment_of_the_command_reaches_the_workers(cluster, corpus, s3):
    """The cluster was started before these variables were set."""
    report = build_distributed("s3://bucket/environment", open_source(corpus), Fake, cluster)
    assert (report.added, report.embedded) == (48, 48)
    assert len(SearchIndex.open("s3://bucket/environment")) == 48


@pytest.mark.nightly
def test_what_workers_encoded_on_object_storage_survives_the_driver(one_worker, corpus, s3, tmp_path, monkeypatch):
    place, load = Remote("s3://bucket/survives"), Watched(Fake, tmp_path / "log", 0.0)
    load.log.mkdir()

    def die(*_) -> None:
        raise RuntimeError("the driver dies")

    with monkeypatch.context() as patched:
        patched.setattr("search_r3.index.distributed.commit.commit_fragments", die)
        with pytest.raises(RuntimeError, match="the driver dies"):
            build_distributed(place, open_source(corpus), load, one_worker)
    calls = len(list(load.log.iterdir()))
    assert calls
    assert build_distributed(place, open_source(corpus), load, one_worker).added == 48
    assert len(list(load.log.iterdir())) == calls, "nothing is encoded again"
    build_index(tmp_path / "one", open_source(corpus), Fake(), progress=False)
    check_equal(rows_of(place), rows_of(tmp_path / "one"))
    left = [one["path"] for batch in open_objects(place).list() for one in batch]
    assert not [path for path in left if "encoded.lance" in path or "spool.lance" in path]


def test_only_whole_work_on_an_unchanged_table_is_committed(corpus, tmp_path):
    """Files put together meanwhile do no harm; rows of someone else's do, and so does a file that is not there."""
    build_index(tmp_path / "index", open_source(corpus), Fake(), progress=False)
    index = SearchIndex.open(tmp_path / "index")
    gone, since = index.search("wrap", None, mode="text").hits[0].id, index.table.version
    index.table.create_index("document", config=BTree())
    assert index.table.version > since
    commit_fragments(tmp_path / "index", [], [gone], since)
    assert gone not in rows_of(tmp_path / "index")
    assert len(rows_of(tmp_path / "index")) == 47
    build_index(tmp_path / "index", open_source(corpus), Fake(), progress=False)
    with pytest.raises(InputError, match=r"was changed by .*; nothing was committed"):
        commit_fragments(tmp_path / "index", [], [gone], since)
    assert len(rows_of(tmp_path / "index")) == 48
    lost = SimpleNamespace(physical_rows=3, files=[SimpleNamespace(path="elsewhere.lance")])
    with pytest.raises(InputError, match="the workers wrote 3 rows, expected 4"):
        check_fragments(tmp_path / "index", [lost], 4)
    with pytest.raises(InputError, match=r"1 files that workers wrote are not in .*s3://BUCKET/NAME"):
        check_fragments(tmp_path / "index", [lost], 3)


@pytest.mark.nightly
def test_what_a_killed_driver_left_is_in_nobodys_way(cluster, corpus, tmp_path):
    for name, build in (
        ("many", lambda path: build_distributed(path, open_source(corpus), Fake, cluster)),
        ("one", lambda path: build_index(path, open_source(corpus), Fake(), progress=False)),
    ):
        (tmp_path / name / "spool.lance" / "data").mkdir(parents=True)
        (tmp_path / name / "spool.lance" / "data" / "half.lance").write_bytes(b"half")
        assert build(tmp_path / name).added == 48
    assert not (tmp_path / "many" / "spool.lance").exists()


def test_nobody_at_the_address_is_one_line_at_once():
    with socket.socket() as taken:  # bound but not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for given in (address, f"ray://{address}"):
            with pytest.raises(InputError, match=f"no Ray cluster answers at {given} .*refused.*use --ray local"):
                _start(ray, Cluster(given))


def printed_only(**settings):
    """What Ray 2.60 does without a token: its C++ code prints why, and the exception says something else."""
    os.write(2, b"[... W 1 1] gcs_client.cc:210: Unauthenticated: RPC error: InvalidAuthToken: Authentication token is")
    raise ConnectionError("Failed to connect to Ray cluster at head:6379")


def refuse(**settings):
    raise ray.exceptions.AuthenticationError("Token authentication is enabled but no authentication token was found")


@pytest.mark.parametrize("answer", [printed_only, refuse])
def test_a_cluster_that_wants_a_token_is_named_as_such(answer, monkeypatch, capfd):
    monkeypatch.setattr(ray, "init", answer)
    monkeypatch.setattr("search_r3.index.distributed.cluster._knock", lambda address: None)
    with pytest.raises(InputError, match=r"the Ray cluster at head:6379 wants a token.*RAY_AUTH_MODE=token"):
        _start(ray, Cluster("head:6379"))
    assert capfd.readouterr().err == ""


def test_a_full_disk_of_a_worker_is_one_line():
    error = RuntimeError(
        "ray::MapWorker(EncodeRows).submit() (pid=12, ip=10.0.0.7)\n  File ...\n"
        "OSError: [Errno 28] No space left on device: '/tmp/ray/x'\n"
    )
    line = str(cause_of(error))
    assert line.startswith("a worker on 10.0.0.7 has no space left on its disk (OSError: [Errno 28] No space left")
    assert "\n" not in line
    other = RuntimeError("something else")
    assert cause_of(other) is other


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(InputError, match="workers is 0"):
        Cluster(workers=0)
    with pytest.raises(InputError, match="the Ray address is empty"):
        Cluster("")
    with pytest.raises(InputError, match="gpus_per_worker is -1"):
        Cluster(gpus_per_worker=-1)


@pytest.mark.nightly
def test_the_command_makes_an_index_that_either_kind_of_build_goes_on_with(
    cluster, corpus, tiny_model, tmp_path, capsys
):
    target, model = str(tmp_path / "index"), ["--model", str(tiny_model)]
    build = ["index", str(corpus), "--into", target, *model, "--json"]
    assert main([*build, "--ray", "local", "--workers", "2"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["added"], made["embedded"], made["model"]) == (48, 48, "tiny-llama-base")
    assert len({row[ROW_HASH] for row in rows_of(target).values()}) == 48
    assert main(build) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["unchanged"], again["embedded"]) == (48, 0)
    assert main(["search", target, "wrap a paragraph", *model, "--reasoning", "off", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hits"]
