"""An index's description says its format: older ones are read, newer ones are refused in a line."""

from __future__ import annotations

import json

import pytest

from search_r3.errors import InputError
from search_r3.index import index_info
from search_r3.index.index_info import FORMAT_VERSION, IndexInfo, migrate

HELD = {
    "format_version": 3, "model_name": "m", "contract_hash": "c" * 64, "dimension": 4, "created": "2026-01-01T00:00:00",
}  # fmt: skip


def test_todays_description_is_read_as_it_is():
    assert migrate(HELD, "here") == HELD
    assert IndexInfo(**migrate(HELD, "here")).model_name == "m"


def test_an_older_description_is_brought_to_this_format_and_not_changed_itself():
    old = {name: value for name, value in HELD.items() if name != "created"} | {"format_version": 0}
    before = json.dumps(old)
    assert migrate(old, "here") == HELD | {"created": ""}
    assert json.dumps(old) == before
    assert sorted(index_info._STEPS) == list(range(FORMAT_VERSION))


def test_a_newer_description_is_refused_in_a_line():
    with pytest.raises(InputError, match=r"^notes-index has index format 4, this search-r3 reads up to 3; upgrade"):
        migrate(HELD | {"format_version": 4}, "notes-index")
