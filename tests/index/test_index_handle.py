"""An index that is written to, moved or exchanged while it is searched: no answer is wrong, none fails without need."""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from search_r3.errors import InputError
from search_r3.index import row_ranking
from search_r3.index.backends.lance import lance_table
from search_r3.index.backends.lance.lance_backend import LanceBackend
from search_r3.index.build.build_index import ONE_COMMIT, build_index
from search_r3.index.index_handle import IndexHandle, IndexUnavailable
from search_r3.index.maintenance import delete_documents, update_documents
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument

pytestmark = pytest.mark.timeout(120)
OLD, NEW = "an old text about whales", "a new text about whales"


def make(path: Path, text: str, model: Any, copies: int = 3) -> Path:
    documents = [SourceDocument(f"{text.split()[1]}-{i}", "", f"{text} {i}", {"n": i}) for i in range(copies)]
    build_index(path, documents, model, progress=False)
    return path


def swap(live: Path, other: Path, _: Any) -> None:
    live.rename(live.with_name("away"))
    other.rename(live)


def swap_slowly(live: Path, other: Path, _: Any) -> None:
    live.rename(live.with_name("away"))
    time.sleep(0.5)
    other.rename(live)


def delete_and_copy(live: Path, other: Path, _: Any) -> None:
    shutil.rmtree(live)
    for file in sorted(other.rglob("*"), reverse=True):  # the manifests come before the data
        target = live / file.relative_to(other)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            shutil.copy2(file, target)
            time.sleep(0.01)


def copy_over(live: Path, other: Path, _: Any) -> None:
    """As rsync --delete: the folders stay, their files change."""
    shutil.copytree(other, live, dirs_exist_ok=True)
    for file in live.rglob("*"):
        if file.is_file() and not (other / file.relative_to(live)).exists():
            file.unlink()


def rebuild(live: Path, _: Path, model: Any) -> None:
    shutil.rmtree(live)
    make(live, NEW, model)


EXCHANGES = [swap, swap_slowly, delete_and_copy, copy_over, rebuild]


class Searching:
    """Threads that search without a pause, each in a mode of its own."""

    def __init__(self, handle: IndexHandle, model: Any, modes: tuple[str, ...] = ("vector", "text", "hybrid")) -> None:
        self.handle, self.model = handle, model
        self.found: Counter[str] = Counter()
        self.failed: list[BaseException] = []
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(mode,), daemon=True) for mode in modes]

    def _run(self, mode: str) -> None:
        while not self.stop.is_set():
            try:
                hits = self.handle.search("whales text", self.model, mode=mode, k=1).hits
                self.found[hits[0].id.split("-")[0] if hits else "nothing"] += 1
            except Exception as error:
                self.failed.append(error)
                time.sleep(0.01)

    def __enter__(self) -> Searching:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(30)

    def until(self, true: Callable[[], bool], seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, (self.found, self.failed[:3], self.handle.problem)
            time.sleep(0.02)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("every", [0.05, 30.0])
def test_an_exchange_that_fits_costs_no_search(tmp_path: Path, model: Any, exchange: Any, every: float) -> None:
    live, other = make(tmp_path / "live", OLD, model), make(tmp_path / "other", NEW, model)
    events: list[str] = []
    handle = IndexHandle(live, every=every, patience=10, on_event=lambda event, line: events.append(event))
    with Searching(handle, model, ("vector", "hybrid")) as searching:
        searching.until(lambda: searching.found["old"] > 5)
        exchange(live, other, model)
        if exchange is copy_over and every > 1:  # nothing has failed, so it is the next look that finds it
            handle.check()
        searching.until(lambda: searching.found["new"] > 5)
    assert searching.failed == []
    assert "unavailable" not in events
    assert handle.problem is None
    assert handle.search("whales", model, mode="text", k=1).hits[0].id.startswith("new")
    build_index(live, [SourceDocument("zebra", "", "a zebra", {})], model, progress=False, prune=False)
    handle.check()
    assert handle.search("zebra", model, mode="text").hits[0].id == "zebra"


def test_a_search_waits_for_an_index_that_is_being_built_in_place_of_another(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = make(tmp_path / "live", OLD, model)
    handle = IndexHandle(live, every=30.0, patience=10)
    make_full_text = lance_table.ensure_full_text

    def late(table: Any) -> bool:
        time.sleep(1)
        return make_full_text(table)

    monkeypatch.setattr(lance_table, "ensure_full_text", late)
    with Searching(handle, model, ("text", "hybrid")) as searching:
        searching.until(lambda: searching.found["old"] > 5)
        rebuild(live, live, model)
        searching.until(lambda: searching.found["new"] > 5)
    assert searching.failed == []
    assert set(searching.found) == {"old", "new"}


def test_a_build_in_place_of_another_index_that_was_interrupted_is_waited_for_once(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = make(tmp_path / "live", OLD, model)
    handle = IndexHandle(live, every=0.0, patience=1)

    def interrupted(table: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lance_table, "ensure_full_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rebuild(live, live, model)
    waited = []
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(InputError, match="first build was interrupted") as caught:
            handle.search("whales", model, mode="text")
        assert not isinstance(caught.value, IndexUnavailable)
        waited.append(time.monotonic() - started)
    assert waited[0] >= 0.5 > waited[1]
    assert handle.problem is None
    assert handle.search("whales", model, mode="vector").hits == []
    make(live, NEW, model)
    assert handle.search("whales", model, mode="text").hits


def test_a_symbolic_link_may_change(tmp_path: Path, model: Any, make_model: Any) -> None:
    old, new = make(tmp_path / "1", OLD, model), make(tmp_path / "2", NEW, model)
    foreign = make(tmp_path / "3", NEW, make_model("other", "b" * 64))
    live, next_link = tmp_path / "live", tmp_path / "next"

    def point(target: Path) -> None:
        next_link.symlink_to(target)
        os.replace(next_link, live)

    point(old)
    events: list[tuple[str, str]] = []
    handle = IndexHandle(live, every=0.02, on_event=lambda *event: events.append(event))
    with Searching(handle, model) as searching:
        searching.until(lambda: searching.found["old"] > 5)
        point(foreign)
        searching.until(lambda: handle.refusal is not None)
        before = searching.found["old"]
        searching.until(lambda: searching.found["old"] > before + 5)  # the one before goes on answering
        assert searching.found["new"] == 0
        assert handle.problem is None
        point(new)
        searching.until(lambda: searching.found["new"] > 5)
        assert handle.refusal is None
    assert searching.failed == []
    assert [event for event, _ in events] == ["refused", "exchanged"]
    assert "made with other" in events[0][1]
    assert str(live) in events[0][1]


@pytest.mark.parametrize("exchange", [swap, delete_and_copy, copy_over])
def test_an_index_of_another_model_is_never_searched(
    tmp_path: Path, model: Any, make_model: Any, exchange: Any
) -> None:
    other_model = make_model("other", "b" * 64)
    live, other = make(tmp_path / "live", OLD, model), make(tmp_path / "other", NEW, other_model)
    kept = Path(shutil.copytree(live, tmp_path / "kept"))
    events: list[str] = []
    handle = IndexHandle(live, every=0.05, patience=0.5, on_event=lambda event, line: events.append(event))
    with Searching(handle, model) as searching:
        searching.until(lambda: searching.found["old"] > 5)
        exchange(live, other, other_model)
        searching.until(lambda: handle.problem is not None)
        with pytest.raises(IndexUnavailable, match="made with other"):
            handle.search("whales", model)
        time.sleep(0.3)
        shutil.rmtree(live)
        kept.rename(live)
        before = searching.found["old"]
        searching.until(lambda: searching.found["old"] > before + 5)
    assert searching.found["new"] == 0
    assert {type(error) for error in searching.failed} <= {IndexUnavailable}
    assert handle.problem is None
    assert events.count("refused") == 1
    assert events.count("unavailable") == 1


def test_a_folder_that_is_gone_is_unavailable_until_it_is_back(tmp_path: Path, model: Any) -> None:
    live = make(tmp_path / "live", OLD, model)
    events: list[str] = []
    handle = IndexHandle(live, every=0.05, patience=0.3, on_event=lambda event, line: events.append(event))
    for away in (tmp_path / "away", tmp_path / "away again"):
        live.rename(away)
        started = time.monotonic()
        with pytest.raises(IndexUnavailable, match="live is missing"):
            handle.search("whales", model, mode="vector")
        assert time.monotonic() - started < 5
        started = time.monotonic()
        with pytest.raises(IndexUnavailable):
            handle.search("whales", model, mode="text")
        assert time.monotonic() - started < 0.2  # nobody waits for it any more
        assert handle.problem
        away.rename(live)
        time.sleep(0.1)
        assert handle.search("whales", model, k=1).hits[0].id.startswith("old")
        assert handle.problem is None
    assert events == ["unavailable", "available"] * 2


def test_lost_data_is_unavailable_and_may_come_back(tmp_path: Path, model: Any) -> None:
    live = make(tmp_path / "live", OLD, model)
    handle = IndexHandle(live, every=0.05, patience=0.3)
    data = live / "chunks.lance" / "data"
    data.rename(tmp_path / "data")
    for options in ({}, {"where": "n = 1"}):  # the filter is not to blame
        with pytest.raises(IndexUnavailable, match="cannot be read"):
            handle.search("whales", model, mode="vector", **options)
    handle.check()
    assert handle.problem
    (tmp_path / "data").rename(data)
    time.sleep(0.1)
    assert handle.search("whales", model, mode="vector", where="n = 1").hits


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
@pytest.mark.parametrize(
    ("files", "damage"),
    [
        ("data/*.lance", lambda file: file.write_bytes(b"junk")),
        ("data/*.lance", lambda file: file.write_bytes(bytes(file.stat().st_size))),
        ("data/*.lance", lambda file: os.truncate(file, file.stat().st_size // 2)),
        ("_indices/*/*", lambda file: file.write_bytes(b"junk")),
        ("_indices/*/*", os.unlink),
    ],
)
def test_damaged_files_are_unavailable_until_they_are_good_again(
    tmp_path: Path, model: Any, files: str, damage: Any, mode: str
) -> None:
    live, events = make(tmp_path / "live", OLD, model), []
    shutil.copytree(live, tmp_path / "good")
    handle = IndexHandle(live, every=0.05, patience=0.2, on_event=lambda event, line: events.append((event, line)))
    for file in (live / "chunks.lance").glob(files):
        damage(file)
    if mode == "vector" and files.startswith("_indices"):  # a search by words finds out
        assert handle.search("whales", model, mode=mode).hits
        with pytest.raises(IndexUnavailable):
            handle.search("whales", model, mode="text")
    for _ in range(2):
        with pytest.raises(IndexUnavailable, match=r"cannot be read .*restore a copy"):
            handle.search("whales", model, mode=mode)
        handle.check()
        assert handle.problem
    assert [event for event, _ in events] == ["unavailable"]
    for file in (tmp_path / "good").rglob("*"):
        if file.is_file():
            target = live / file.relative_to(tmp_path / "good")
            target.parent.mkdir(exist_ok=True)
            shutil.copy2(file, target)
    handle.check()
    assert handle.problem is None
    assert handle.search("whales", model, mode=mode).hits
    assert [event for event, _ in events] == ["unavailable", "available"]


def test_what_the_user_did_wrong_stays_an_input_error(tmp_path: Path, model: Any) -> None:
    handle = IndexHandle(make(tmp_path / "live", OLD, model))
    started = time.monotonic()
    for options in ({"where": "nothing = 1"}, {"k": 0}, {"mode": "x"}):
        with pytest.raises(InputError) as caught:
            handle.search("whales", model, **options)
        assert not isinstance(caught.value, IndexUnavailable)
    with pytest.raises(ZeroDivisionError):
        handle.run(lambda index: 1 / 0)
    with pytest.raises(RuntimeError, match="ours"):
        handle.run(lambda index: (_ for _ in ()).throw(RuntimeError("ours")))
    assert time.monotonic() - started < 1.5
    assert handle.problem is None


@pytest.mark.parametrize(
    "where",
    [
        "n = 'os error 2'",  # LanceDB quotes it too
        "nothing = 'chunks.lance: no such file'",
        "cast('NoSuchKey' as int) = n",
        "cast('RetryError' as int) = n",  # what object storage says
        "cast(concat('os error 5', title) as int) = n",
    ],
)
def test_the_words_of_a_filter_are_no_loss_of_files(tmp_path: Path, model: Any, where: str) -> None:
    handle = IndexHandle(make(tmp_path / "live", OLD, model), every=600)
    for mode in ("vector", "text", "hybrid"):
        with pytest.raises(InputError) as caught:
            handle.search("whales", model, mode=mode, where=where)
        assert not isinstance(caught.value, IndexUnavailable)
    assert handle.problem is None
    assert not handle._suspect


def test_a_place_to_write_to(tmp_path: Path, model: Any, make_model: Any) -> None:
    ours = make(tmp_path / "1", OLD, model)
    foreign = make(tmp_path / "2", NEW, make_model("other", "b" * 64))
    live, events = tmp_path / "live", []
    handle_of = lambda path: IndexHandle(path, every=600, patience=0.3, on_event=lambda *event: events.append(event[0]))  # noqa: E731

    def point(target: Path) -> None:
        (tmp_path / "next").symlink_to(target)
        os.replace(tmp_path / "next", live)

    point(ours)
    handle = handle_of(live)
    assert handle.writable() == ours
    point(foreign)
    with pytest.raises(IndexUnavailable, match="made with other"):
        handle.writable()
    point(ours)
    assert handle.writable() == ours
    assert handle.refusal is None
    ours.rename(tmp_path / "away")
    threading.Timer(0.1, (tmp_path / "away").rename, [ours]).start()
    assert handle.writable() == ours  # it waits for one that is being exchanged
    ours.rename(tmp_path / "away")
    with pytest.raises(IndexUnavailable, match="is missing"):
        handle.writable()
    assert events == ["refused", "unavailable"]


def test_ordinary_commits_are_followed(tmp_path: Path, model: Any) -> None:
    live = make(tmp_path / "live", OLD, model)
    events: list[str] = []
    handle = IndexHandle(live, every=0.0, on_event=lambda event, line: events.append(event))
    held = handle.index
    for i in range(3):
        build_index(live, [SourceDocument(f"z{i}", "", f"zebra {i}", {})], model, progress=False, prune=False)
        assert {hit.document for hit in handle.search("zebra", model, mode="text").hits} >= {f"z{i}"}
    delete_documents(live, ["z1"])
    assert "z1" not in {hit.document for hit in handle.search("zebra", model, mode="text").hits}
    assert handle.index.backend._session is held.backend._session  # what LanceDB has cached stays
    assert events == []


def writes_between(monkeypatch: pytest.MonkeyPatch, write: Callable[[], Any]) -> None:
    """`write()` after each search of the vectors, before the search of the words."""
    by_text = LanceBackend.search_text

    def late(*given: Any) -> Any:
        write()
        return by_text(*given)

    monkeypatch.setattr(LanceBackend, "search_text", late)


@pytest.mark.parametrize("kind", ["handle", "following", "remote"])
def test_both_lists_of_a_search_are_of_one_version(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch, request: Any, kind: str
) -> None:
    live: Any = tmp_path / "live"
    if kind == "remote":
        request.getfixturevalue("s3")
        live = f"s3://bucket/pinned/{uuid.uuid4().hex}"
    monkeypatch.setattr("search_r3.index.backends.lance.lance_table.FOLLOW_WRITES", timedelta(0))
    documents = [SourceDocument(f"d{i}", "", f"whales number{i} old", {}) for i in range(40)]
    build_index(live, documents, model, progress=False)
    index: Any = SearchIndex.open(live) if kind == "following" else IndexHandle(live, every=0.0)
    versions: list[str] = ["old"]

    def write() -> None:
        text = f"whales and more whales, version{len(versions)}"
        update_documents(live, [SourceDocument(f"d{i}", "", f"{text} of {i}") for i in range(40)], model)
        versions.append(text)
        if kind != "following":
            index.check()

    writes_between(monkeypatch, write)
    for _ in range(3):
        now = versions[-1]
        hits = index.search("whales version1 version2 number1", model, k=40, reasoning=False).hits
        assert {(hit.document, hit.text) for hit in hits} == {
            (f"d{i}", f"whales number{i} old" if now == "old" else f"{now} of {i}") for i in range(40)
        }
        assert all(hit.ranks.keys() == {"vector", "text"} for hit in hits)


def test_all_rounds_of_a_search_are_of_one_version(tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search_r3.index.backends.lance.lance_table.FOLLOW_WRITES", timedelta(0))
    monkeypatch.setattr(row_ranking, "POOL", 4)
    long = "\n\n".join(f"{'whales ' * 200}{i}" for i in range(30))
    documents = [SourceDocument("d0", "", long, kind="text"), SourceDocument("d1", "", "whales and other fish")]
    build_index(tmp_path / "live", documents, model)
    index = SearchIndex.open(tmp_path / "live")
    left = ["d0", "d1"]
    writes_between(monkeypatch, lambda: left and delete_documents(tmp_path / "live", [left.pop()]))
    hits = index.search("whales", model, k=2, reasoning=False).hits
    assert left == []  # there were two rounds at least
    assert [hit.document for hit in hits] == ["d0", "d1"]


def test_a_mistake_of_the_user_is_said_at_once_while_others_write(tmp_path: Path, model: Any) -> None:
    live = make(tmp_path / "live", OLD, model)
    handle = IndexHandle(live, every=0.0)
    asked = []

    def wrong(index: SearchIndex) -> None:
        asked.append(index)
        update_documents(live, [SourceDocument("z", "", f"zebra {len(asked)}")], model, commit_every=ONE_COMMIT)
        raise InputError("the filter cannot be used")

    with pytest.raises(InputError, match="the filter"):
        handle.run(wrong)
    assert len(asked) <= 2


def test_what_is_opened_without_following_stays(tmp_path: Path, model: Any) -> None:
    live = make(tmp_path / "live", OLD, model)
    index = SearchIndex.open(live, follow=False)
    build_index(live, [SourceDocument("z", "", "zebra", {})], model, progress=False, prune=False)
    time.sleep(0.1)
    assert len(index) == 3


def test_opening_says_what_is_wrong(tmp_path: Path, model: Any) -> None:
    with pytest.raises(InputError, match="does not exist"):
        IndexHandle(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(InputError, match=r"link is not a search-r3 index"):
        IndexHandle(tmp_path / "link")


def test_an_opened_index_refuses_a_model_once_another_index_is_in_its_place(
    tmp_path: Path, model: Any, make_model: Any
) -> None:
    other = make_model("other", "b" * 64)
    live = make(tmp_path / "live", OLD, model)
    index = SearchIndex.open(live)
    swap(live, make(tmp_path / "new", NEW, other), other)
    index.table.checkout_latest()  # as LanceDB does by itself
    with pytest.raises(InputError, match="made with other"):
        index.search("whales", model)


def test_object_storage_exchanged_and_gone(
    s3_server: str, monkeypatch: pytest.MonkeyPatch, model: Any, make_model: Any
) -> None:
    import boto3

    for name, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server, "AWS_ALLOW_HTTP": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    bucket = boto3.resource("s3", endpoint_url=s3_server, region_name="us-east-1").Bucket("bucket")

    def remake(text: str, maker: Any) -> None:
        bucket.objects.filter(Prefix="handled/").delete()
        make("s3://bucket/handled", text, maker)  # type: ignore[arg-type]

    remake(OLD, model)
    events: list[str] = []
    handle = IndexHandle(
        "s3://bucket/handled", every=0.1, patience=10, on_event=lambda event, line: events.append(event)
    )
    assert handle.search("whales", model, k=1).hits[0].id.startswith("old")
    remake(NEW, model)
    assert handle.search("whales", model, k=1).hits[0].id.startswith("new")
    remake(NEW, make_model("other", "b" * 64))
    handle.patience = 0.5
    with pytest.raises(IndexUnavailable, match="made with other"):
        handle.search("whales", model)
    bucket.objects.filter(Prefix="handled/").delete()
    time.sleep(0.2)
    handle.check()
    assert handle.problem
    remake(OLD, model)
    time.sleep(0.2)
    assert handle.search("whales", model, k=1).hits[0].id.startswith("old")
    assert handle.problem is None
    assert events[-1] == "available" or events[-2] == "available"
