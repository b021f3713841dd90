"""A search that reads through Lance alone finds what one through LanceDB finds, and is loaded sooner."""

from __future__ import annotations

import shutil
import sys

import lance
import numpy as np
import pytest
from processes import run

from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, build_index
from search_r3.index.backends.lance import approximate
from search_r3.index.backends.lance.snapshot import LanceSnapshot

pytestmark = pytest.mark.slow

WORDS = "red green blue gold pink grey teal plum lime rust sand mint war 東京 planet".split()  # noqa: SIM905


@pytest.fixture(scope="module", params=[None, 200], ids=["exact", "approximate"])
def place(tmp_path_factory, shared_model, request):
    """An index that no test changes."""
    path = tmp_path_factory.mktemp("snapshot") / "i"
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=8)) for _ in range(400)]
    documents = [SourceDocument(f"{i:03d}", "", text, {"number": i}) for i, text in enumerate(texts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(approximate, "SAMPLES", 20)  # its recall is not the matter here
        build_index(path, documents, shared_model, approximate_from=request.param)
    return path


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
@pytest.mark.parametrize("options", [{}, {"where": "number < 100"}, {"where": "number > 3", "exact": True}, {"k": 300}])
def test_it_finds_what_lancedb_finds(place, model, mode, options):
    opened, snapshot = SearchIndex.open(place, follow=False), SearchIndex.open_snapshot(place)
    for query in ("red gold war", "東京 teal", "planet"):
        expected = opened.search(query, model, mode=mode, **options)
        found = snapshot.search(query, model, mode=mode, **options)
        assert [hit.id for hit in found.hits] == [hit.id for hit in expected.hits]
        np.testing.assert_allclose([h.score for h in found.hits], [h.score for h in expected.hits], atol=1e-6)
        assert [(h.text, h.metadata) for h in found.hits] == [(h.text, h.metadata) for h in expected.hits]
    assert (len(snapshot), snapshot.complete, snapshot.columns) == (len(opened), opened.complete, opened.columns)
    assert (snapshot.approximate, snapshot.info) == (opened.approximate, opened.info)


def test_filters_that_are_wrong_are_the_same_errors(place, model):
    for where in ("color = 'red'", "number >", "number = 1; DROP TABLE x", "path"):
        messages = []
        for index in (SearchIndex.open(place, follow=False), SearchIndex.open_snapshot(place)):
            with pytest.raises(InputError) as error:
                index.search("red", model, where=where)
            messages.append(str(error.value).partition("(")[0])
        assert messages[0] == messages[1]


def test_a_followed_index_is_read_by_lance_and_a_filter_counted_once_for_each_version(tmp_path, model, monkeypatch):
    path, where = tmp_path / "i", "number < 3"
    documents = [SourceDocument(str(i), "", f"text {i}", {"number": i}) for i in range(12)]
    build_index(path, documents, model, approximate_from=10)
    counted = []
    count_rows = LanceSnapshot.count_rows
    monkeypatch.setattr(
        LanceSnapshot, "count_rows", lambda table, where: counted.append(where) or count_rows(table, where)
    )
    index = SearchIndex.open(path)
    first = index.pinned().backend
    assert isinstance(first.table, LanceSnapshot)
    for _ in range(2):
        assert len(index.search("text", model, reasoning=False, where=where).hits) == 3
    assert counted == [where]
    build_index(path, [*documents, SourceDocument("more", "", "text more", {"number": 0})], model)
    index = index.latest()
    assert len(index.search("text", model, reasoning=False, where=where).hits) == 4
    assert counted == [where] * 2
    assert index.pinned().backend.version > first.version


def test_new_tables_have_a_format_in_which_rows_of_equal_values_are_read_fast(tmp_path, model):
    build_index(tmp_path / "i", [SourceDocument("a", "", "a text")], model)
    assert lance.dataset(tmp_path / "i" / "chunks.lance").data_storage_version == "2.1"


def test_what_is_no_index_is_the_same_error(tmp_path, model):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    build_index(tmp_path / "broken", [SourceDocument("a", "", "a text")], model)
    for manifest in (tmp_path / "broken" / "chunks.lance" / "_versions").glob("*.manifest"):
        manifest.write_bytes(b"x")
    for name in ("none", "empty", "file", "broken"):
        messages = []
        for opening in (SearchIndex.open, SearchIndex.open_snapshot):
            with pytest.raises(InputError) as error:
                opening(tmp_path / name)
            messages.append(str(error.value).partition("(")[0])
        assert messages[0] == messages[1]


def test_a_search_by_words_on_the_command_line_loads_neither_lancedb_nor_a_model(place):
    code = f"""
import shutil
import sys
from search_r3.cli import main
assert main(["search", {str(place)!r}, "war", "--mode", "text"]) == 0
heavy = {{"lancedb", "torch", "transformers", "tokenizers", "peft"}} & set(sys.modules)
assert not heavy, heavy
"""
    run([sys.executable, "-c", code])


@pytest.mark.parametrize("damage", ["no full-text index", "junk", "half"])
@pytest.mark.parametrize("options", [[], ["--where", "title = 'x'"]])
def test_a_search_of_damaged_files_is_one_line(tmp_path, model, capsys, damage, options) -> None:
    path = tmp_path / "index"
    build_index(path, [SourceDocument(f"d{i}", "x", f"bread and water {i}") for i in range(40)], model, progress=False)
    if damage == "no full-text index":
        shutil.rmtree(path / "chunks.lance/_indices")
    for file in (path / "chunks.lance/data").glob("*.lance") if damage != "no full-text index" else ():
        file.write_bytes(b"junk" if damage == "junk" else file.read_bytes()[: file.stat().st_size // 2])
    assert main(["search", str(path), "bread", "--mode", "text", *options]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"{path}: files of the index are missing or damaged" in line
