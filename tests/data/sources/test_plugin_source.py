"""A package from outside adds a kind of source: it is named in a recipe, checked, and built again when it changes."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from plugin_package import code_of_docstring, code_of_page, install_plugin, without_docstrings

from search_r3.data.build_cache import module_files
from search_r3.data.pairs import read_pairs
from search_r3.data.recipe import build_pairs
from search_r3.data.sources.data_source import DataSource
from search_r3.data.sources.registry import REGISTRY
from search_r3.errors import InputError

ENTRY = "[search_r3.data_sources]\nfaq = MODULE:FAQ\n"
CODE = code_of_page("data-source")
RECIPE = "sources:\n  - {{kind: faq, path: {place}/faq.json{more}}}\n"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install_plugin(tmp_path / "installed", monkeypatch, "faq-pairs", ENTRY, CODE)
    entries = [{"question": f"how {i}", "answer": f"so {i}"} for i in range(3)]
    (tmp_path / "faq.json").write_text(json.dumps(entries), encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(place=tmp_path, more=""), encoding="utf-8")
    return path


def test_the_docstring_shows_the_source_of_the_page() -> None:
    assert without_docstrings(code_of_docstring(DataSource)) == without_docstrings(CODE)


def test_a_recipe_names_a_source_of_another_package(recipe: Path, tmp_path: Path) -> None:
    manifest = build_pairs(recipe, tmp_path / "pairs.jsonl")
    pairs = sorted(read_pairs(tmp_path / "pairs.jsonl"), key=lambda pair: pair.id)
    assert [(pair.id, pair.query, pair.positive) for pair in pairs] == [
        (f"faq:{i}", f"how {i}", f"so {i}") for i in range(3)
    ]
    (source,) = manifest["sources"]
    assert source["license"] == "CC0-1.0"
    assert source["inputs"]["bytes"] == (tmp_path / "faq.json").stat().st_size


def test_its_keys_are_checked_as_ours_are(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.format(place=tmp_path, more=", pth: x"), encoding="utf-8")
    with pytest.raises(InputError, match=r'source 1 \(faq\): unknown key "pth"; did you mean "path"'):
        build_pairs(recipe, tmp_path / "pairs.jsonl")
    recipe.write_text("sources: [{kind: faq}]\n", encoding="utf-8")
    with pytest.raises(InputError, match=r'source 1 \(faq\): "path" is missing'):
        build_pairs(recipe, tmp_path / "pairs.jsonl")


def test_a_finished_part_is_stale_when_the_package_has_changed(recipe: Path, tmp_path: Path) -> None:
    broken = recipe.read_text(encoding="utf-8") + "  - {kind: pairs, path: gone.jsonl, license: CC0-1.0}\n"
    recipe.write_text(broken, encoding="utf-8")

    def lines() -> list[str]:
        told: list[str] = []
        with pytest.raises(InputError, match=r"gone\.jsonl"):
            build_pairs(recipe, tmp_path / "pairs.jsonl", report=told.append)
        return told

    assert "  3 pairs" in lines()
    assert "  3 pairs (finished before)" in lines()
    (module,) = (tmp_path / "installed").glob("plugin_for_test_*.py")
    module.write_text(CODE.replace('["answer"]', '["answer"].upper()'), encoding="utf-8")
    assert "  3 pairs" in lines()


def test_a_module_s_files_are_those_that_it_imports_of_its_own_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "faq_package"
    (package / "inside").mkdir(parents=True)
    for name, text in (
        ("__init__.py", ""),
        ("sources.py", "from . import reading\nfrom .inside.deep import thing\nimport json\n"),
        ("reading.py", "import faq_package.more\n"),
        ("more.py", ""),
        ("unrelated.py", ""),
        ("inside/__init__.py", ""),
        ("inside/deep.py", "from ..more import x\nthing = 1\n"),
    ):
        (package / name).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    names = {file.relative_to(package).as_posix() for file in module_files("faq_package.sources")}
    assert names - {"__init__.py", "inside/__init__.py"} == {"sources.py", "reading.py", "more.py", "inside/deep.py"}
    for name in [name for name in sys.modules if name.startswith("faq_package")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("entries", "code", "message"),
    [
        (
            ENTRY,
            "FAQ = print",
            "'faq' in search_r3.data_sources is a builtin_function_or_method; expected a DataSource",
        ),
        (ENTRY.replace("faq =", "titles ="), CODE, "'titles' .* has the name of a built-in source"),
        (ENTRY, CODE.replace('{"path": str}', '{"path": str, "limit": int}'), "takes the key 'limit', which every"),
    ],
)
def test_a_plugin_that_is_no_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: str, code: str, message: str
) -> None:
    install_plugin(tmp_path, monkeypatch, "faq-pairs", entries, code)
    with pytest.raises(InputError, match=message):
        REGISTRY.entries()
