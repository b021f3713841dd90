"""Two writers of one index on object storage: the second is refused, a killed or paused one does no harm."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import threading
import time
import uuid

import pytest
from google_storage import google_storage
from nightly import nightly
from processes import start
from storage_faults import storage

from search_r3.cli import main
from search_r3.index import SearchIndex, SourceDocument, build_index, open_source, update_documents
from search_r3.index.backends.lance.approximate import tuned
from search_r3.index.build.build_index import ONE_COMMIT
from search_r3.index.build.index_diff import IndexDiff
from search_r3.index.maintenance import compact_index, delete_documents, maintain_index
from search_r3.index.row_keys import ROW_HASH, VECTOR
from search_r3.index.storage import lease as leases
from search_r3.index.storage.lease import Lease
from search_r3.index.storage.location import IndexBusy, Remote

pytestmark = pytest.mark.slow

DOCUMENTS = [SourceDocument(f"d{number}", "", f"text number {number} of water") for number in range(40)]


@pytest.fixture
def place(s3):
    return Remote(f"s3://bucket/lease/{uuid.uuid4().hex}")


def end_renewal(lease: Lease) -> None:
    """What a killed process, or one that is paused, does no more."""
    lease._ended.set()
    lease._thread.join(10)


def test_one_writer_holds_the_index_and_the_next_is_told_who(place, model):
    first = Lease(place)
    first.acquire()
    for change in (
        lambda: build_index(place, DOCUMENTS, model),
        lambda: delete_documents(place, ["d1"]),
        lambda: compact_index(place),
    ):
        with pytest.raises(IndexBusy, match=r"another writer is using s3://.*process \d+ on .*, since 2.*expires at 2"):
            change()
    first.check()
    first.release()
    assert build_index(place, DOCUMENTS, model).added == 40
    assert delete_documents(place, ["d1"]).chunks == 1


def test_of_many_that_wait_each_has_the_lease_alone(place):
    holding, most, turns = 0, 0, []

    def work(name: int) -> None:
        nonlocal holding, most
        lease = Lease(place, seconds=5)
        lease.acquire(wait=30)
        holding += 1
        most = max(most, holding)
        time.sleep(0.05)
        lease.check()
        holding -= 1
        lease.release()
        turns.append(name)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 1
    assert sorted(turns) == list(range(6))


def test_a_lease_is_renewed_while_its_holder_lives_and_taken_over_when_it_does_not(place):
    first = Lease(place, seconds=1.5)
    first.acquire()
    with pytest.raises(IndexBusy):
        Lease(place, seconds=1.5).acquire(wait=3.0)
    end_renewal(first)
    second = Lease(place, seconds=1.5)
    started = time.monotonic()
    second.acquire(wait=1.5)
    assert time.monotonic() - started < 1.5 * 1.5 + 2
    with pytest.raises(IndexBusy, match=r"did not renew its lease for over 1.5 seconds, .* \(process"):
        first.check()
    first.release()  # leaves the other's lease alone
    second.check()
    second.release()


@pytest.mark.parametrize("hours", [-3, 3])
def test_a_holder_whose_clock_is_wrong_keeps_its_lease_and_loses_it_when_it_is_dead(place, hours, monkeypatch):
    first = Lease(place, seconds=1.5)
    content = first._content
    wrong = lambda released=False: json.dumps(  # noqa: E731
        (record := json.loads(content(released))) | {"expires": record["expires"] + hours * 3600}
    ).encode()
    monkeypatch.setattr(first, "_content", wrong)
    first.acquire()
    with pytest.raises(IndexBusy):
        Lease(place, seconds=1.5).acquire()
    end_renewal(first)
    second = Lease(place, seconds=1.5)
    second.acquire()
    second.release()


def test_a_write_whose_answer_was_lost_still_counts(place):
    lease = Lease(place)
    real = lease._obstore.put

    def put(store, name, content, *, mode):  # the client's own second try meets what the first one did
        real(store, name, content, mode=mode)
        return real(store, name, content, mode=mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease._obstore, "put", put)
        lease.acquire()
        lease.check()
    lease.release()
    assert Lease(place)._read()[0].released


def test_a_lease_is_written_by_single_puts_which_a_stale_version_does_not_pass(s3, s3_server, place):
    """moto completes an upload of several parts whatever its condition: a lease must never be one."""
    with storage(s3_server) as watched:
        s3.setenv("AWS_ENDPOINT_URL", watched.url)
        lease = Lease(Remote(str(place)), seconds=0.6)
        lease.acquire()
        stale, until = lease._version, time.monotonic() + 20
        while lease._version == stale and time.monotonic() < until:  # it is renewed
            time.sleep(0.05)
        lease.check()
        thief = Lease(Remote(str(place)))
        assert not thief._put(thief._content(), stale)
        assert not thief._put(thief._content(), "create")
        lease.check()
        lease.release()
    writes = [line for line in watched.requests if not line.startswith(("GET", "HEAD"))]
    leases_written = [line for line in writes if "/.writer.json" in line]
    assert len(leases_written) >= 5
    assert all(line.startswith("PUT ") and "?" not in line for line in leases_written), leases_written
    assert not any("uploads" in line or "partNumber" in line for line in writes)


def test_google_cloud_which_compares_generations(model):
    with google_storage() as options:
        place = Remote("gs://bucket/index", options)
        for _ in range(2):  # the object is made, then changed
            lease = Lease(place, seconds=1.5)
            lease.acquire()
            with pytest.raises(IndexBusy):
                Lease(place).acquire()
            time.sleep(1)
            assert lease._lost is None  # it was renewed meanwhile
            lease._renewed = (0.0, 0.0)
            lease.check()
            lease.release()
        paused, other = Lease(place, seconds=1.5), Lease(place)
        paused.acquire()
        end_renewal(paused)
        other.acquire(wait=3)
        with pytest.raises(IndexBusy, match="another writer has taken over"):
            paused.check()
        other.release()


def test_what_somebody_else_wrote_there_is_no_obstacle_for_long(place):
    lease = Lease(place, seconds=1)
    lease._obstore.put(lease.store, leases.NAME, b"not a lease")
    lease.mine = dataclasses.replace(lease.mine, seconds=1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, "WATCH", 0.02)
        lease.acquire()
    lease.release()


def test_a_build_that_was_paused_and_lost_its_lease_commits_nothing_more(place, model, monkeypatch):
    build_index(place, DOCUMENTS[:10], model)
    monkeypatch.setattr(leases, "SECONDS", 1.0)
    monkeypatch.setattr(leases, "FRESH_SECONDS", 0.0)
    version = SearchIndex.open(place).table.version

    def documents():
        yield from DOCUMENTS[:20]
        [held] = [thread for thread in threading.enumerate() if thread.name == "lease"]
        held._target.__self__._ended.set()  # as if the process stood still
        other = Lease(place)
        other.acquire(wait=5)
        assert json.loads(bytes(other._obstore.get(other.store, leases.NAME).bytes()))["token"] == other.mine.token
        end_renewal(other)

    with pytest.raises(IndexBusy, match="another writer has taken over"):
        build_index(place, documents(), model)
    assert SearchIndex.open(place).table.version == version
    time.sleep(1)
    assert build_index(place, DOCUMENTS, model, wait=5).added == 30
    assert SearchIndex.open(place).describe()["duplicate_ids"] == 0


def test_two_builds_at_once_leave_every_document_once(place, model, make_model):
    refused: list[str] = []

    def documents():
        yield from DOCUMENTS[:20]
        for commit_every in (None, 5):
            with pytest.raises(IndexBusy) as raised:
                build_index(place, DOCUMENTS, make_model(), commit_every=commit_every)
            refused.append(str(raised.value))
        yield from DOCUMENTS[20:]

    assert build_index(place, documents(), model, commit_every=5).added == 40
    assert len(refused) == 2
    index = SearchIndex.open(place)
    assert (len(index), index.describe()["duplicate_ids"], index.complete) == (40, 0, True)


def test_a_killed_process_blocks_nobody_for_long(place, model, monkeypatch):
    code = (
        "import sys, time\nfrom search_r3.index.storage import lease\n"
        "from search_r3.index.storage.location import Remote\n"
        "one = lease.Lease(Remote(sys.argv[1]), 2.0); one.acquire(); print('held', flush=True); time.sleep(60)"
    )
    with start([sys.executable, "-c", code, str(place)]) as child:
        child.line("held", seconds=60)
        with pytest.raises(IndexBusy, match=f"process {child.pid} on"):
            build_index(place, DOCUMENTS, model)
        child.process.send_signal(signal.SIGKILL)
        child.process.wait(10)
        assert build_index(place, DOCUMENTS, model, wait=2.0).added == 40


def duplicate(index: SearchIndex, count: int, equal: bool) -> None:
    """What two writers without a lease leave behind: rows of `count` ids twice, equal ones or with another title."""
    rows = index.table.to_arrow().slice(0, count)
    for name in () if equal else ("title", ROW_HASH):
        place = index.table.schema.get_field_index(name)
        rows = rows.set_column(place, index.table.schema.field(place), [["newer"] * len(rows)])
    index.table.add(rows)


@pytest.mark.parametrize("remote", [False, *nightly(True)])
@pytest.mark.parametrize("by", ["build", "compact"])
def test_duplicate_ids_are_reported_and_the_next_run_removes_them(place, tmp_path, model, capsys, remote, by):
    where = place if remote else tmp_path / "index"
    build_index(where, DOCUMENTS, model)
    index = SearchIndex.open(where)
    assert index.describe()["duplicate_ids"] == 0
    duplicate(index, 7, equal=by == "compact")
    assert len(index) == 47
    assert index.describe()["duplicate_ids"] == 7
    assert main(["index", "--info", str(where)]) == 0
    assert "problem:  7 duplicate ids; the next `search-r3 index`" in capsys.readouterr().out
    if by == "compact":
        assert main(["compact", str(where)]) == 0
        assert capsys.readouterr().out.count("7 duplicates removed") == 1
    else:
        report = build_index(where, DOCUMENTS, model)
        assert (report.duplicates_removed, report.updated, report.differing) == (7, 7, None)
    after = SearchIndex.open(where)
    assert after.table.count_rows("title = 'newer'") == 0
    assert len(after) == 40
    assert after.describe()["duplicate_ids"] == 0
    assert after.complete
    assert VECTOR in after.table.schema.names
    assert build_index(where, DOCUMENTS, model).duplicates_removed == 0


CHANGES = {
    "build": lambda path, model: build_index(path, DOCUMENTS[:30], model, approximate_from=20),
    "update": lambda path, model: update_documents(path, DOCUMENTS[:1], model, commit_every=ONE_COMMIT),
    "compact": lambda path, model: compact_index(path),
    "maintain": lambda path, model: maintain_index(path, always=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_lease_that_is_lost_while_the_approximate_index_is_measured_ends_the_run(
    tmp_path, model, monkeypatch, change
):
    path, versions = tmp_path / "index", []
    monkeypatch.setattr("search_r3.index.backends.lance.approximate.SAMPLES", 10)
    build_index(path, DOCUMENTS, model, approximate_from=20)
    tags = SearchIndex.open(path).table.tags.list()

    def check(self):
        if versions:
            raise IndexBusy("another writer has taken it over")

    def measure(*given, **options):
        found = tuned(*given, **options)
        versions.append(SearchIndex.open(path).table.version)
        return found

    monkeypatch.setattr("search_r3.index.storage.lease.WriteLock.check", check)
    monkeypatch.setattr("search_r3.index.backends.lance.approximate.tuned", measure)
    monkeypatch.setattr("search_r3.index.backends.lance.approximate.GROWN", 0.5)  # it is due again
    with pytest.raises(IndexBusy):
        CHANGES[change](path, model)
    assert len(versions) == 1
    index = SearchIndex.open(path)
    assert index.table.version == versions[0]
    assert index.table.tags.list() == ({} if change == "build" else tags)


def test_a_lease_that_is_lost_while_removals_are_looked_for_ends_the_run(tmp_path, model, monkeypatch):
    path, notes = tmp_path / "index", tmp_path / "notes"
    notes.mkdir()
    (notes / "one.md").write_text("some text")
    build_index(path, open_source(notes / "one.md"), model)
    versions = []

    def check(self):
        if versions:
            raise IndexBusy("another writer has taken it over")

    def gone(self, lost=True):
        yield from found(self, lost)
        versions.append(SearchIndex.open(path).table.version)

    found = IndexDiff.gone
    monkeypatch.setattr("search_r3.index.storage.lease.WriteLock.check", check)
    monkeypatch.setattr(IndexDiff, "gone", gone)
    with pytest.raises(IndexBusy):
        build_index(path, open_source(notes), model)
    assert SearchIndex.open(path).table.version == versions[0]
