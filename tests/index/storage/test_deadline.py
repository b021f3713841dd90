"""An operation on object storage ends at its deadline, whatever the storage does; one on a folder has none."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from storage_faults import storage

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.index.storage.deadline import DEADLINE_SECONDS, deadline_of, within_deadline
from search_r3.index.storage.location import Remote, StorageError


@pytest.fixture
def place() -> Remote:
    return Remote("s3://bucket/x")


def test_what_takes_longer_than_the_deadline_is_given_up(place, monkeypatch):
    monkeypatch.setenv("SEARCH_R3_STORAGE_DEADLINE", "0.2")
    done = threading.Event()
    with pytest.raises(StorageError, match=r"s3://bucket/x: the search was given up after 0.2 s.*STORAGE_DEADLINE"):
        within_deadline(place, "the search", lambda: done.wait(20))
    done.set()
    assert within_deadline(Path("folder"), "the search", lambda: time.sleep(0.3) or 7) == 7


def test_results_and_errors_pass_and_an_operation_within_another_has_no_deadline_of_its_own(place, monkeypatch):
    monkeypatch.setenv("SEARCH_R3_STORAGE_DEADLINE", "20")
    assert within_deadline(place, "x", lambda: 7) == 7
    with pytest.raises(KeyError, match="gone"):
        within_deadline(place, "x", lambda: {}["gone"])
    outer = within_deadline(
        place, "x", lambda: (threading.get_ident(), within_deadline(place, "y", threading.get_ident))
    )
    assert outer[0] == outer[1] != threading.get_ident()


def test_the_deadline_leaves_time_for_requests_as_long_as_they_may_be(place, monkeypatch):
    assert deadline_of(place) == DEADLINE_SECONDS
    assert deadline_of(place.for_writing()) == 150
    monkeypatch.setenv("SEARCH_R3_STORAGE_DEADLINE", "12.5s")
    assert deadline_of(place.for_writing()) == 12.5
    for wrong in ("soon", "0", "-1", "nan"):
        monkeypatch.setenv("SEARCH_R3_STORAGE_DEADLINE", wrong)
        with pytest.raises(InputError, match="SEARCH_R3_STORAGE_DEADLINE is"):
            deadline_of(place)


@pytest.mark.slow
def test_a_mute_endpoint_is_given_up_at_the_deadline(s3, s3_server, capsys):
    with storage(s3_server) as mute:
        mute.fault = "silent"
        s3.setenv("AWS_ENDPOINT_URL", mute.url)
        s3.setenv("SEARCH_R3_STORAGE_TIMEOUT", "60")
        s3.setenv("SEARCH_R3_STORAGE_DEADLINE", "1")
        for command in (["search", "s3://bucket/x", "water", "--mode", "text"], ["index", "--info", "s3://bucket/x"]):
            started = time.monotonic()
            assert main(command) == 2
            assert time.monotonic() - started < 30
            [line] = capsys.readouterr().err.splitlines()
            assert line.startswith("error: s3://bucket/x: opening the index was given up after 1 s")
