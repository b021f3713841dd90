"""Many small writes: what they cost on disk, what searches see meanwhile, and what a kill leaves."""

import os
import random
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from processes import start

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.index import (
    SearchIndex,
    SourceDocument,
    build_index,
    compact_index,
    delete_documents,
    delete_source,
    maintain_index,
    update_documents,
)
from search_r3.index.backends.lance import approximate, compaction, durable
from search_r3.index.backends.lance.approximate import read_approximate
from search_r3.index.build.build_index import ONE_COMMIT

pytestmark = pytest.mark.slow

AT_ONCE = {"commit_every": ONE_COMMIT, "progress": False}
NOW = timedelta(0)


def text(number):
    rng = random.Random(number)
    return " ".join(f"word{rng.randrange(500)}" for _ in range(12)) + f" only{number}"


def document(name, number):
    return SourceDocument(name, "", text(number))


def size(path):
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())


def files(path):
    return sum(item.is_file() for item in path.rglob("*"))


def fragments(path):
    return compaction.open_dataset(path).get_fragments()


@pytest.fixture
def path(tmp_path, model):
    build_index(tmp_path / "index", [document(f"d{i}", i) for i in range(300)], model, progress=False)
    return tmp_path / "index"


@pytest.fixture
def eager(monkeypatch):
    """Small thresholds: everything that may happen happens within some dozen writes."""
    for name, value in {"TIERS": (4, 16, 64, 1_048_576), "MANY": 4, "UNINDEXED_TEXT": 6, "SEGMENTS": 3, "EVERY": 5,
                        "KEEP_VERSIONS": NOW}.items():  # fmt: skip
        monkeypatch.setattr(compaction, name, value)


def write_some(path, model, count):
    """`count` documents added, as many replaced and as many deleted, one at a time; texts of what should be there."""
    held = {f"d{i}": i for i in range(300)}
    for i in range(count):
        update_documents(path, [document(f"new{i}", 1000 + i)], model, **AT_ONCE)
        update_documents(path, [document(f"d{i}", 2000 + i)], model, **AT_ONCE)
        delete_documents(path, [f"d{100 + i}"])
        held |= {f"new{i}": 1000 + i, f"d{i}": 2000 + i}
        del held[f"d{100 + i}"]
    return held


def test_a_small_write_does_not_rewrite_the_data(tmp_path, make_model):
    """With the thresholds as they are: ten of them cost a tenth of 4.6 MB of vectors, not ten times as much."""
    model, path = make_model(dimension=576), tmp_path / "index"
    build_index(path, [document(f"d{i}", i) for i in range(2000)], model, progress=False)
    before = size(path)
    for i in range(10):
        update_documents(path, [document(f"d{i}", 3000 + i)], model, progress=False)
    assert size(path) < 1.1 * before
    assert fragments(path)[0].physical_rows == 2000  # the ten old rows are marked as deleted
    done = compact_index(path)
    assert done.bytes_after < 2.2 * before
    assert done.bytes_old > 0.9 * before
    assert compact_index(path, keep=NOW).bytes_after < 1.05 * before


@pytest.mark.nightly
def test_bytes_and_files_stay_bounded_and_searches_right(path, model, make_model, tmp_path, eager):
    held = write_some(path, model, 40)
    index = SearchIndex.open(path)
    assert index.complete
    assert len(index) == 300
    assert files(path) < 100
    written = size(path)
    tail, every = index.search("only1039 word3", model, mode="text", k=1), {}
    assert tail.hits[0].document == "new39"

    build_index(tmp_path / "fresh", [document(name, number) for name, number in held.items()], model, progress=False)
    fresh = SearchIndex.open(tmp_path / "fresh")
    for mode in ("vector", "text", "hybrid"):
        for query in ("word1 word2 word3", "word77", "only2003 word9"):
            every[mode, query] = fresh.search(query, model, mode=mode, k=300, reasoning=False)
            found = index.search(query, model, mode=mode, k=300, reasoning=False)
            assert {hit.id for hit in found.hits} == {hit.id for hit in every[mode, query].hits}
    done = compact_index(path, keep=NOW)
    assert (done.files_after, done.bytes_old < 100_000) == (1, True)
    assert written < 2 * done.bytes_after
    index = SearchIndex.open(path)
    for (mode, query), right in every.items():
        found = index.search(query, model, mode=mode, k=300, reasoning=False)
        assert {hit.id: hit.score for hit in found.hits} == pytest.approx({hit.id: hit.score for hit in right.hits})


@pytest.mark.nightly
def test_large_files_stay_while_small_ones_are_put_together(path, model, eager):
    first = fragments(path)[0].fragment_id
    for i in range(40):
        update_documents(path, [document(f"new{i}", 1000 + i)], model, **AT_ONCE)
    assert fragments(path)[0].fragment_id == first
    assert len(fragments(path)) < 16
    segments = compaction.open_dataset(path).describe_indices()[0].segments
    assert len(segments) <= 4
    assert SearchIndex.open(path).search("only1007", model, mode="text", k=1).hits[0].document == "new7"


def test_a_file_is_written_again_once_many_of_its_rows_are_deleted(path, eager):
    first = fragments(path)[0].fragment_id
    for i in range(59):
        delete_documents(path, [f"d{i}"])
    assert fragments(path)[0].fragment_id == first
    for i in range(59, 63):
        delete_documents(path, [f"d{i}"])
    (left,) = fragments(path)
    assert left.fragment_id != first
    assert left.count_rows() + left.num_deletions < 245


def test_a_document_is_found_as_soon_as_its_write_returns(path, model, eager):
    index = SearchIndex.open(path)
    for i in range(30):
        update_documents(path, [document(f"new{i}", 1000 + i)], model, **AT_ONCE)
        index.table.checkout_latest()
        for mode in ("text", "vector"):
            hits = index.search(text(1000 + i), model, mode=mode, k=1, reasoning=False).hits
            assert hits[0].document == f"new{i}"
        assert index.complete


def test_a_version_is_kept_from_when_it_was_replaced_not_from_when_it_was_made(path, model, monkeypatch):
    monkeypatch.setattr(compaction, "EVERY", 1)
    monkeypatch.setattr(compaction, "KEEP_VERSIONS", timedelta(seconds=1))
    reader = SearchIndex.open(path)
    version = reader.table.version
    time.sleep(1.2)  # longer than a version is kept
    update_documents(path, [document("new", 1000)], model, **AT_ONCE)
    reader.table.checkout(version)
    assert len(reader.search("word1", model, mode="vector", k=300, reasoning=False).hits) == 300
    time.sleep(1.2)
    update_documents(path, [document("new", 1001)], model, **AT_ONCE)
    assert version not in [held["version"] for held in SearchIndex.open(path).table.list_versions()]


def test_a_reader_of_an_old_version_survives_many_writes(path, model, monkeypatch):
    monkeypatch.setattr(compaction, "EVERY", 2)
    monkeypatch.setattr(compaction, "MOST_VERSIONS", 3)
    monkeypatch.setattr(compaction, "AT_LEAST", timedelta(minutes=1))  # a reader's time, on however slow a machine
    reader = SearchIndex.open(path)
    reader.table.checkout(reader.table.version)
    for i in range(12):
        update_documents(path, [document(f"d{i}", 1000 + i)], model, **AT_ONCE)
    assert [hit.text for hit in reader.search("only3", model, mode="text", k=1).hits] == [text(3)]
    monkeypatch.setattr(compaction, "AT_LEAST", NOW)
    update_documents(path, [document("d0", 1)], model, **AT_ONCE)
    update_documents(path, [document("d0", 2)], model, **AT_ONCE)
    assert len(SearchIndex.open(path).table.list_versions()) <= 6


@pytest.mark.parametrize("mode", ["text", "vector", "hybrid"])
def test_a_reader_goes_on_when_the_files_under_it_are_removed_at_once(path, model, mode):
    delete_documents(path, ["d7"])
    readers = [SearchIndex.open(path) for _ in range(3)]  # which look for a new version after two seconds only
    assert [len(reader) for reader in readers] == [299] * 3
    compact_index(path, keep=NOW)
    found = readers[0].search("word1 word2", model, mode=mode, k=300, reasoning=False).hits
    assert {hit.document for hit in found} <= {f"d{i}" for i in range(300)} - {"d7"}
    assert found
    filtered = readers[1].search("word1 word2", model, mode=mode, k=3, where="title = ''", reasoning=False)
    assert len(filtered.hits) == 3
    assert readers[2].describe()["documents"] == 299


@pytest.mark.nightly
def test_what_is_left_undone_is_done_by_the_next_maintenance(path, model, eager):
    for i in range(25):
        update_documents(path, [document(f"new{i}", 1000 + i)], model, maintain=False, **AT_ONCE)
        delete_documents(path, [f"d{i}"], maintain=False)
    assert len(fragments(path)) > 25
    maintain_index(path)
    assert len(fragments(path)) < 10
    assert files(path) < 40
    index = SearchIndex.open(path)
    assert (index.complete, len(index)) == (True, 300)


@pytest.mark.nightly
def test_the_approximate_index_stays_right(tmp_path, make_model, eager, monkeypatch):
    monkeypatch.setattr(approximate, "SAMPLES", 20)  # how well its recall is known is not the matter here
    model, path = make_model(), tmp_path / "index"
    build_index(path, [document(f"d{i}", i) for i in range(300)], model, approximate_from=300, progress=False)
    assert SearchIndex.open(path).approximate is not None
    for i in range(80):
        update_documents(path, [document(f"new{i}", 1000 + i)], model, **AT_ONCE)
        delete_documents(path, [f"d{i}"])
    index = SearchIndex.open(path)
    kept = read_approximate(index.table)
    assert kept is not None
    assert kept.measured_rows >= 300
    for number in (1000, 1041, 1079, 299):
        for exact in (False, True):
            hits = index.search(text(number), model, mode="vector", k=1, reasoning=False, exact=exact).hits
            assert np.isclose(hits[0].score, 1.0, atol=1e-3)


def test_the_command_says_when_the_space_comes_back(path, model, capsys, monkeypatch):
    monkeypatch.setattr("search_r3.cli.index_maintenance.WORTH_A_LINE", 0)
    update_documents(path, [document("new", 1000)], model, progress=False)
    delete_documents(path, ["d1"])
    assert main(["compact", str(path)]) == 0
    said = capsys.readouterr().out
    assert "files of rows became 1" in said
    assert "kept for 2 minutes" in said
    assert f"`search-r3 compact {path} --now` at once" in said
    before = size(path)
    assert main(["compact", str(path), "--now"]) == 0
    assert "kept" not in capsys.readouterr().out
    assert size(path) < 0.7 * before


WRITER = """
    import sys
    from datetime import timedelta
    sys.path[:0] = [sys.argv[2], sys.argv[2] + "/.."]
    from conftest import FakeEncoder
    from test_index_small_writes import AT_ONCE, document
    from search_r3.index import delete_documents, update_documents
    from search_r3.index.backends.lance import compaction
    compaction.TIERS, compaction.MANY, compaction.UNINDEXED_TEXT = (4, 16, 64, 1_048_576), 4, 6
    compaction.SEGMENTS, compaction.EVERY, compaction.KEEP_VERSIONS = 3, 3, timedelta(0)
    path, model, start = sys.argv[1], FakeEncoder(), int(sys.argv[3])
    for i in range(start, start + 1000):
        update_documents(path, [document(f"k{i}", 5000 + i)], model, **AT_ONCE)
        print("+", i, flush=True)
        if i % 3 == 2:
            delete_documents(path, [f"k{i}"])
            print("-", i, flush=True)
"""


@pytest.mark.nightly
def test_a_kill_at_any_moment_loses_nothing_that_was_acknowledged(path, model):
    rng, there, first = random.Random(0), {}, 0
    for _ in range(6):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(Path(__file__).parent), str(first)]
        with start(command) as writer:
            writer.line(rf"\+ {first + rng.randrange(2, 22)}$")
            time.sleep(0.05 * rng.random())
            writer.kill()
            lines = writer.stdout.splitlines()
        for what, number in map(str.split, lines):
            there[int(number)] = what == "+"
        last = max(there)
        first = last + 2  # `last` may be deleted and the next written, without a word
        index = SearchIndex.open(path)
        assert index.complete
        held = set(index.table.search().select(["document"]).to_arrow()["document"].to_pylist())
        assert {f"d{i}" for i in range(300)} <= held
        unsure = {last} if there[last] and last % 3 == 2 else set()  # its deletion may have come before the kill
        assert all((f"k{number}" in held) is there[number] for number in there if number not in unsure)
        there[last] = f"k{last}" in held
        assert len(index.search("word1", model, mode="vector", k=1, reasoning=False).hits) == 1
    compact_index(path, keep=NOW)
    assert files(path) < 30  # and nothing of what was killed


def test_a_write_is_on_the_disk_when_it_returns_and_old_files_go_only_after(path, model, eager, monkeypatch):
    synced, cleaned = set(), []
    sync = durable._sync

    def watched(name, place):
        synced.add(Path(name))
        sync(name, place)

    monkeypatch.setattr(durable, "_sync", watched)
    before = {item for item in path.rglob("*") if item.is_file()}
    update_documents(path, [document("new", 1000)], model, **AT_ONCE)
    new = {item for item in path.rglob("*") if item.is_file()} - before
    assert {item.parent.name for item in new} >= {"data", "_versions"}
    assert synced >= new | {item.parent for item in new}
    delete_documents(path, ["d1"])
    assert any(item.parent.name == "_deletions" for item in synced)

    cleanup = compaction.open_dataset(path).cleanup_old_versions
    monkeypatch.setattr(type(compaction.open_dataset(path)), "cleanup_old_versions",
                        lambda self, **options: (cleaned.append(set(synced)), cleanup(**options)))  # fmt: skip
    compact_index(path, keep=NOW)
    left = {item for item in path.rglob("*.lance") if item.is_file()}
    assert left <= cleaned[0]


def named(path):
    """The files that the newest version of the table names, and its manifest; with the folders that they stand in."""
    table, dataset = path / "chunks.lance", compaction.open_dataset(path)
    fragments = [fragment.metadata for fragment in dataset.get_fragments()]
    files = {table / "data" / file.path for fragment in fragments for file in fragment.files}
    deletions = {f"{one.id}-{one.deletion_file.read_version}-" for one in fragments if one.deletion_file}
    files |= {item for item in (table / "_deletions").glob("*") if item.name.startswith(tuple(deletions))}
    segments = [str(segment.uuid) for index in dataset.describe_indices() for segment in index.segments]
    files |= {item for segment in segments for item in (table / "_indices" / segment).rglob("*") if item.is_file()}
    files.add(max((table / "_versions").glob("*.manifest"), key=lambda item: item.stat().st_mtime_ns))
    return files | {item.parent for item in files}


@pytest.mark.parametrize("change", ["build", "update", "delete", "delete source", "maintain", "compact"])
@pytest.mark.parametrize("killed", [False, True])
def test_every_file_of_the_newest_version_is_on_the_disk_when_a_change_returns(
    tmp_path, model, eager, monkeypatch, change, killed
):
    path, synced, sync = tmp_path / "index", set(), durable._sync

    def watched(name, place):
        synced.add(Path(name))
        sync(name, place)

    monkeypatch.setattr(durable, "_sync", watched)
    monkeypatch.setattr(durable, "CLOCK", 0.05)
    monkeypatch.setattr(
        compaction, "KEEP_VERSIONS", timedelta(minutes=2)
    )  # where files are removed, others are flushed
    for source in ("first", "second"):
        documents = [document(f"{source}{i}", i) for i in range(30)]
        build_index(path, documents, model, source=source, progress=False)
    with monkeypatch.context() as patch:
        if killed:  # each after its commit, before it saw that on the disk; what it wrote stays as it is
            monkeypatch.setattr(compaction, "MANY", 1000)
            patch.setattr("search_r3.index.build.build_run.flush", lambda *_: None)
        for i in range(8):
            update_documents(path, [document(f"new{i}", 1000 + i)], model, maintain=False, **AT_ONCE)
    time.sleep(0.1)
    if change == "build":
        build_index(path, [document(f"first{i}", i) for i in range(29)], model, source="first", progress=False)
    elif change == "update":
        update_documents(path, [document("last", 1)], model, **AT_ONCE)
    elif change == "delete":
        delete_documents(path, ["first7"])
    elif change == "delete source":
        delete_source(path, "second")
    elif change == "maintain":
        maintain_index(path)
    else:
        compact_index(path)
    assert killed or len(fragments(path)) < 8
    assert named(path) - synced == set()


def test_a_disk_that_fails_is_one_line(path, model, monkeypatch):
    def broken(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(InputError, match="flush to disk"):
        update_documents(path, [document("new", 1000)], model, **AT_ONCE)


def test_what_the_disk_did_not_take_is_written_again(path, model, monkeypatch):
    """Linux reports a failed fsync once, and then calls the same file written."""
    fsync, failed = os.fsync, []

    def fails_once(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if not failed and name.endswith(".lance"):
            failed.append((name, os.fstat(descriptor).st_ino))
            raise OSError(5, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", fails_once)
    change = [document("new", 1000)]
    with pytest.raises(InputError, match="flush to disk"):
        update_documents(path, change, model, **AT_ONCE)
    update_documents(path, change, model, **AT_ONCE)
    [(name, inode)] = failed
    assert os.stat(name).st_ino != inode
    assert len(SearchIndex.open(path)) == 301
