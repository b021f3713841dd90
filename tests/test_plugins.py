"""A package from outside adds to our registries by its entry points alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugin_package import install_plugin

from search_r3.errors import InputError
from search_r3.plugins import load_plugins

BROKEN = "[search_r3.engines]\nfast = MODULE:VALUE\n"


def test_an_installed_package_adds_to_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "three" not in load_plugins("rewards")
    install_plugin(tmp_path, monkeypatch, "gold", "[search_r3.rewards]\nthree = MODULE:VALUE\n")
    assert load_plugins("rewards")["three"] == 3
    assert "three" not in load_plugins("engines")


def test_a_plugin_that_cannot_be_imported_is_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install_plugin(tmp_path, monkeypatch, "broken", BROKEN, r"raise OSError('no chip\nhere')")
    with pytest.raises(InputError, match=r"plugin 'fast' of broken .*search_r3\.engines.*no chip; fix or uninstall"):
        load_plugins("engines")


def test_a_plugin_whose_object_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install_plugin(tmp_path, monkeypatch, "lacking", "[search_r3.engines]\nfast = MODULE:Other\n")
    with pytest.raises(InputError, match=r"plugin 'fast' of lacking .* has no attribute 'Other'"):
        load_plugins("engines")


def test_two_packages_cannot_add_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for package in ("one", "two"):
        install_plugin(tmp_path / package, monkeypatch, package, "[search_r3.data_sources]\nmail = MODULE:VALUE\n")
    with pytest.raises(InputError, match=r"(one and two|two and one) both add 'mail' to search_r3\.data_sources"):
        load_plugins("data_sources")


def test_an_unknown_group_is_a_mistake_of_ours():
    with pytest.raises(ValueError, match="no group of plugins 'reward'"):
        load_plugins("reward")
