"""Building and updating an index: only what changed is embedded, and no failure leaves a broken one."""

import json
import os
import sys
import textwrap

import numpy as np
import pytest
from processes import run

from search_r3.errors import InputError
from search_r3.index import SearchIndex, SourceDocument, build_index, open_source


def docs(*texts, **metadata):
    return [SourceDocument(f"d{i}", f"Title {i}", text, dict(metadata)) for i, text in enumerate(texts)]


def rows(path):
    table = SearchIndex.open(path).table.search().to_arrow()
    return {row["id"]: row for row in table.to_pylist()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "index"


@pytest.mark.parametrize("kind", ["beir", "jsonl", "csv", "folder", "file"])
def test_an_index_of_every_kind_of_source_finds_its_document(tmp_path, path, model, kind):
    records = [
        {"_id": "whale", "title": "Whales", "text": "whales sing"},
        {"_id": "ant", "title": "", "text": "ants walk"},
    ]
    lines = "\n".join(json.dumps(record) for record in records)
    source = tmp_path / "source"
    source.mkdir()
    (source / "corpus.jsonl").write_text(lines)
    (source / "x.jsonl").write_text(lines)
    (source / "x.csv").write_text("id,title,text\nwhale,Whales,whales sing\nant,,ants walk\n")
    (source / "sub").mkdir()
    (source / "sub" / "whale.md").write_text("# Whales\nwhales sing\n")
    (source / "sub" / "ant.py").write_text("'''ants walk'''\n")
    place = {"beir": "", "jsonl": "x.jsonl", "csv": "x.csv", "folder": "sub", "file": "sub/whale.md"}[kind]
    opened = open_source(source / place)
    assert opened.kind == kind
    report = build_index(path, opened, model)
    assert report.added == report.documents == report.embedded == (1 if kind == "file" else 2)
    for mode in ("vector", "text", "hybrid"):
        assert SearchIndex.open(path).search("whales sing", model, mode=mode).hits[0].id.startswith("whale")


def test_a_second_build_embeds_nothing(path, model):
    build_index(path, docs("one", "two"), model)
    version = SearchIndex.open(path).table.version
    report = build_index(path, docs("one", "two"), model)
    assert (report.unchanged, report.added, report.updated, report.removed, report.embedded) == (2, 0, 0, 0, 0)
    assert len(model.encoded) == 2
    assert SearchIndex.open(path).table.version == version


def test_only_what_changed_is_embedded_and_what_is_gone_is_removed(path, model):
    build_index(path, docs("one", "two", "three", year=1), model)
    report = build_index(path, [*docs("one", "TWO", year=1), SourceDocument("d9", "", "nine")], model)
    assert (report.unchanged, report.updated, report.added, report.removed) == (1, 1, 1, 1)
    assert model.encoded[3:] == ["Title 1 TWO", "nine"]
    assert set(rows(path)) == {"d0", "d1", "d9"}


def test_changed_metadata_is_written_without_embedding(path, model):
    build_index(path, docs("one", "two", year=1, open=True), model)
    before = rows(path)
    report = build_index(path, docs("one", "two", year=2), model)
    assert (report.updated, report.embedded) == (2, 0)
    after = rows(path)
    assert after["d0"]["year"] == 2
    assert after["d0"]["open"] is None
    assert after["d0"]["r3_vector"] == before["d0"]["r3_vector"]


def test_text_that_moved_keeps_its_embedding(path, model):
    """A heading put in at the top shifts every chunk's number; the chunks below it are not embedded again."""
    words = [" ".join(f"{name}{i}" for i in range(150)) for name in ("alpha", "beta", "gamma")]
    document = SourceDocument("a.txt", "a.txt", "\n\n".join(words), {}, "a.txt", 1, "text")
    build_index(path, [document], model, commit_every=1)
    moved = SourceDocument("a.txt", "a.txt", "\n\n".join([words[2] + " new", *words]), {}, "a.txt", 1, "text")
    assert build_index(path, [moved], model, commit_every=1).embedded == 1
    fresh = path.with_name("fresh")
    build_index(fresh, [moved], model)
    for identifier, row in rows(fresh).items():
        assert rows(path)[identifier]["r3_vector"] == row["r3_vector"]


def test_prune_false_adds_to_what_is_there(path, model):
    build_index(path, docs("one", "two"), model)
    report = build_index(path, [SourceDocument("new", "", "three")], model, prune=False)
    assert (report.added, report.removed, len(SearchIndex.open(path))) == (1, 0, 3)


def test_a_different_max_length_embeds_again(path, model):
    build_index(path, docs("one"), model)
    assert build_index(path, docs("one"), model, max_length=8).embedded == 1


def test_an_interrupted_build_goes_on_where_it_stopped(path, model):
    texts = [f"text number {i}" for i in range(20)]
    model.fail_after = 11
    with pytest.raises(RuntimeError, match="out of memory"):
        build_index(path, docs(*texts), model, commit_every=5)
    index = SearchIndex.open(path)
    assert (len(index), index.complete, len(model.encoded)) == (10, False, 10)
    assert index.search("text number", model).hits  # what is there can be searched
    model.fail_after = None
    report = build_index(path, docs(*texts), model, commit_every=5)
    assert (report.unchanged, report.added, report.embedded) == (10, 10, 10)
    assert len(model.encoded) == 20
    assert SearchIndex.open(path).complete


def test_a_killed_build_leaves_an_index_that_opens_and_goes_on(path, model):
    """The process dies at once, with no chance to clean up, while it embeds what would be the fourth commit."""
    code = """
        import os, sys, time
        sys.path.insert(0, sys.argv[2])
        from conftest import FakeEncoder
        from search_r3.index import SearchIndex, SourceDocument, build_index
        def committed():
            try:
                return len(SearchIndex.open(sys.argv[1]))
            except ValueError:
                return 0
        class Dying(FakeEncoder):
            def encode_document(self, texts, **options):
                if len(self.encoded) >= 12:
                    while committed() < 8:
                        time.sleep(0.01)
                    os._exit(9)
                return super().encode_document(texts, **options)
        documents = [SourceDocument(f"d{i}", f"Title {i}", f"text {i}") for i in range(20)]
        build_index(sys.argv[1], documents, Dying(), commit_every=4)
    """
    folder = os.path.dirname(os.path.dirname(__file__))  # where conftest is
    done = run([sys.executable, "-c", textwrap.dedent(code), path, folder], check=False)
    assert done.returncode == 9
    assert not SearchIndex.open(path).complete
    kept = len(SearchIndex.open(path))
    assert kept in (8, 12)  # whole commits, and at most what was embedded
    report = build_index(path, docs(*[f"text {i}" for i in range(20)]), model)
    assert (report.unchanged, report.embedded) == (kept, 20 - kept)
    assert SearchIndex.open(path).complete


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_bad_embeddings_are_refused_and_nothing_is_written(path, model, value):
    def spoil(matrix):
        matrix[-1] = value
        return matrix

    model.spoil = spoil
    with pytest.raises(InputError, match='for "d1"'):
        build_index(path, docs("one", "two"), model)
    assert not path.exists()
    model.spoil = lambda matrix: matrix[:, :-1]
    with pytest.raises(InputError, match=r"shape \(2, 63\)"):
        build_index(path, docs("one", "two"), model)


def test_another_models_embeddings_are_refused(path, model, make_model):
    build_index(path, docs("one"), model)
    other = make_model("other", "b" * 64)
    with pytest.raises(InputError) as error:
        build_index(path, docs("one", "two"), other)
    assert all(part in str(error.value) for part in ("fake", "a" * 12, "other", "b" * 12, "new index"))
    with pytest.raises(InputError, match="other"):
        SearchIndex.open(path).search("one", other)
    assert SearchIndex.open(path).search("one", other, mode="text").hits  # words need no embedding


def test_ids_that_come_twice_are_named_with_both_places(path, model):
    twice = [SourceDocument("a", "", "x", path="f.jsonl", line=3), SourceDocument("a", "", "y", path="f.jsonl", line=8)]
    with pytest.raises(InputError, match=r'"a".*f.jsonl line 3.*f.jsonl line 8'):
        build_index(path, twice, model)


def test_no_documents_changes_nothing(path, model):
    build_index(path, docs("one"), model)
    with pytest.raises(InputError, match="no documents"):
        build_index(path, [], model)
    assert len(SearchIndex.open(path)) == 1
    assert SearchIndex.open(path).complete


def test_metadata_types_must_agree(path, model):
    mixed = [SourceDocument("a", "", "x", {"year": 2020}), SourceDocument("b", "", "y", {"year": "old"})]
    with pytest.raises(InputError, match=r'"b".*year is text.*elsewhere it is integer.*--type year=text'):
        build_index(path, mixed, model)
    assert not path.exists()
    with pytest.raises(InputError, match="share the column"):
        build_index(path, [SourceDocument("a", "", "x", {"Year": 1, "year": 2})], model)
    with pytest.raises(InputError, match="201 different"):
        build_index(path, [SourceDocument("a", "", "x", {f"k{i}": 1 for i in range(201)})], model)


def test_places_that_are_no_index_are_refused(tmp_path, path, model):
    with pytest.raises(InputError, match="does not exist"):
        SearchIndex.open(path)
    (tmp_path / "file").write_text("x")
    for action in (SearchIndex.open, lambda p: build_index(p, docs("one"), model)):
        with pytest.raises(InputError, match="is a file"):
            action(tmp_path / "file")
    with pytest.raises(InputError, match="not a search-r3 index"):
        SearchIndex.open(tmp_path)
    with pytest.raises(InputError, match=r"\(file\); give a new folder"):
        build_index(tmp_path, docs("one"), model)
    assert not (tmp_path / "chunks.lance").exists()


def test_a_damaged_index_and_a_newer_one_are_refused(path, model, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr("search_r3.index.index_info.FORMAT_VERSION", 99)
        build_index(path, docs("one"), model)
    with pytest.raises(InputError, match=r"format 99.*upgrade"):
        SearchIndex.open(path)
    for manifest in (path / "chunks.lance" / "_versions").glob("*.manifest"):
        manifest.write_bytes(b"junk")
    with pytest.raises(InputError, match="damaged"):
        SearchIndex.open(path)


def test_a_lance_table_of_someone_else_is_refused(path):
    import lancedb

    lancedb.connect(str(path)).create_table("chunks", [{"id": "a"}])
    with pytest.raises(InputError, match="did not write"):
        SearchIndex.open(path)


def test_two_builds_at_once_are_refused(path, model):
    def slow():
        yield from docs("one")
        with pytest.raises(InputError, match="another build"):
            build_index(path, docs("two"), model)

    assert build_index(path, slow(), model).added == 1


def test_an_open_index_sees_later_commits(path, model, monkeypatch):
    from datetime import timedelta

    monkeypatch.setattr("search_r3.index.backends.lance.lance_table.FOLLOW_WRITES", timedelta(0))
    build_index(path, docs("one"), model)
    index = SearchIndex.open(path)
    build_index(path, docs("one", "two"), model)
    assert len(index) == 2


def test_what_the_source_skipped_is_in_the_report(tmp_path, path, model):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.txt").write_text("text")
    (tmp_path / "s" / "b.txt").write_bytes(b"\xff\xfe")
    assert [item.path for item in build_index(path, open_source(tmp_path / "s"), model).skipped] == ["b.txt"]


def test_describe_is_json(path, model):
    build_index(path, docs("one", "two", year=1), model)
    described = json.loads(json.dumps(SearchIndex.open(path).describe()))
    assert (described["chunks"], described["documents"], described["model_name"]) == (2, 2, "fake")
    assert described["columns"]["year"] == "integer"
