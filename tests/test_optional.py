"""A package that is missing is named in one line, with the command that installs it."""

from __future__ import annotations

import sys
import types

import pytest

from search_r3.errors import InputError
from search_r3.optional import optional_imports, require


def test_what_is_installed_is_imported():
    assert require("json", "search", "a test").dumps([1]) == "[1]"


def test_what_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "no_such_package", None)
    expected = r"^the test needs the package no-such-package; run: pip install 'search-r3\[evaluation\]'$"
    with pytest.raises(InputError, match=expected):
        require("no_such_package.part", "evaluation", "the test")


def test_what_is_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "old_package", types.ModuleType("old_package"))
    expected = r"the test needs packages that cannot be imported \(cannot import name 'new'"
    with pytest.raises(InputError, match=expected), optional_imports("search", "the test"):
        from old_package import new  # type: ignore[import-not-found]  # noqa: F401
