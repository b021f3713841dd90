"""What an interrupted build left out is missing until the same source is brought again, and the index says so."""

import pytest

from search_r3.cli.index_maintenance import show_info
from search_r3.index import SearchIndex, SourceDocument, build_index, delete_source, open_source, update_documents
from search_r3.index.build.build_index import ONE_COMMIT

POSTED = [SourceDocument("posted", "", "said by a client")]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.index"


@pytest.fixture
def make(tmp_path):
    """`make("notes", 6)`: a folder with so many files that say their name."""

    def write(folder, count):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (tmp_path / folder / f"{number}.md").write_text(f"The text of {folder}, number {number}.\n")
        return tmp_path / folder

    return write


def interrupt(path, documents, make_model, **options):
    model = make_model()
    model.fail_after = 2
    with pytest.raises(RuntimeError, match="out of memory"):
        build_index(path, documents, model, commit_every=1, batch_size=1, **options)


@pytest.mark.parametrize("options", [{"commit_every": ONE_COMMIT, "maintain": False}, {"commit_every": ONE_COMMIT}, {}])
def test_a_post_does_not_finish_what_was_interrupted(path, make, model, make_model, options):
    folder = make("notes", 6)
    interrupt(path, open_source(folder), make_model)
    assert 0 < len(SearchIndex.open(path)) < 6
    for text in ("x", "y"):
        update_documents(path, [SourceDocument("posted", "", text)], model, **options)
        assert not SearchIndex.open(path).complete
    build_index(path, open_source(folder), model)
    assert SearchIndex.open(path).complete
    assert len(SearchIndex.open(path)) == 7
    update_documents(path, [SourceDocument("posted", "", "z")], model, **options)
    assert SearchIndex.open(path).complete


@pytest.mark.parametrize("options", [{"maintain": False}, {}])
def test_a_post_finishes_nothing_of_an_index_that_does_not_say_what_was_interrupted(path, model, make_model, options):
    documents = [SourceDocument(f"d{i}", "", f"text {i}") for i in range(6)]
    interrupt(path, documents, make_model, prune=False)
    update_documents(path, POSTED, model, commit_every=ONE_COMMIT, **options)
    assert not SearchIndex.open(path).complete
    build_index(path, documents, model, prune=False)
    assert SearchIndex.open(path).complete


@pytest.mark.parametrize("end", ["again", "around", "delete"])
def test_a_run_of_another_source_does_not_finish_it_either(path, make, model, make_model, capsys, end):
    first, second = make("all/first", 6), make("second", 1)
    build_index(path, open_source(second), model)
    interrupt(path, open_source(first), make_model)
    for prune in (True, False):
        make("second", 2 if prune else 3)
        build_index(path, open_source(second), model, prune=prune)
        build_index(path, open_source(first / "1.md"), model)
        index = SearchIndex.open(path)
        assert not index.complete
        assert {source.name: source.unfinished for source in index.sources} == {str(first): True, str(second): False}
    show_info(index, as_json=False)
    assert "6 documents" not in (said := capsys.readouterr().out)
    assert "never finished" in said
    assert said.count("its last run was interrupted") == 1
    if end == "again":
        build_index(path, open_source(first), model)
    elif end == "around":
        build_index(path, open_source(first.parent), model)
    else:
        delete_source(path, str(first))
    index = SearchIndex.open(path)
    assert index.complete
    assert not any(source.unfinished for source in index.sources)
