"""The commands on sources: what is kept, what is asked, what is refused, and with which exit code."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from search_r3.cli import main
from search_r3.index import SearchIndex, SourceDocument, update_documents


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_model):
    """`here("notes", "--into", "x")` runs `search-r3 index` in a folder of its own; gives exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    return tmp_path


@pytest.fixture
def run(here, tiny_model, capsys):
    def call(*arguments):
        model = ["--model", str(tiny_model)] if arguments[0] == "index" and "--info" not in arguments else []
        code = main([*arguments, *model])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def write(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"This is {name}.\n")
    return folder


def documents(index):
    return set(SearchIndex.open(index).table.search().select(["document"]).to_arrow()["document"].to_pylist())


EIGHT = [f"n{i}.md" for i in range(8)]


def test_a_subset_of_a_folder_removes_nothing_and_asks_nothing(here, run):
    write(here / "notes", *EIGHT)
    assert run("index", "notes", "--into", "X")[0] == 0
    for part in ("notes/n3.md", "notes"):
        code, out, err = run("index", part, "--into", "X")
        assert (code, err) == (0, "")
        assert "0 removed" in out
        assert documents("X") == set(EIGHT)


def test_posted_documents_survive_the_command(here, run, tiny_model):
    from search_r3 import SearchR3

    write(here / "notes", *EIGHT)
    run("index", "notes", "--into", "X")
    update_documents(
        "X", [SourceDocument("posted", "", "by a client")], SearchR3.from_pretrained(tiny_model, device="cpu")
    )
    (here / "notes/n0.md").unlink()
    code, out, _ = run("index", "notes", "--into", "X")
    assert (code, "1 removed" in out) == (0, True)
    assert documents("X") == {*EIGHT[1:], "posted"}


def test_removing_much_needs_a_flag_where_nobody_can_be_asked(here, run):
    write(here / "notes", *EIGHT)
    run("index", "notes", "--into", "X")
    for name in EIGHT[:5]:
        (here / "notes" / name).unlink()
    write(here / "notes", "new.md")
    code, out, err = run("index", "notes", "--into", "X")
    assert code == 2
    assert "error: the source no longer has 5 documents (5 of the source's 8 chunks)" in err
    assert "--prune" in err
    assert "1 added" in out
    assert documents("X") == {*EIGHT, "new.md"}
    assert SearchIndex.open("X").complete
    assert run("index", "notes", "--into", "X", "--keep")[0] == 0
    code, _, err = run("index", "notes", "--into", "X", "--keep", "--prune")
    assert (code, "give one of them" in err) == (2, True)
    code, out, _ = run("index", "notes", "--into", "X", "--prune")
    assert (code, "5 removed" in out) == (0, True)
    assert documents("X") == {*EIGHT[5:], "new.md"}


@pytest.mark.parametrize("answer", ["y", "n"])
def test_removing_much_is_asked_on_a_terminal(here, run, monkeypatch, answer):
    write(here / "notes", *EIGHT)
    run("index", "notes", "--into", "X")
    for name in EIGHT[:7]:
        (here / "notes" / name).unlink()
    asked = []
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True, write=lambda text: 0, flush=lambda: None))
    monkeypatch.setattr("typer.confirm", lambda text, err: asked.append(text) or answer == "y")
    assert run("index", "notes", "--into", "X")[0] == (0 if answer == "y" else 2)
    assert asked == ["the source no longer has 7 documents (7 of the source's 8 chunks): remove them from the index?"]
    assert len(documents("X")) == (1 if answer == "y" else 8)


def test_a_few_are_removed_unasked(here, run):
    write(here / "notes", *EIGHT)
    run("index", "notes", "--into", "X")
    (here / "notes/n0.md").unlink()
    assert run("index", "notes", "--into", "X")[0] == 0
    assert documents("X") == set(EIGHT[1:])


def test_default_names_do_not_meet(here, run):
    for parent in ("a", "b"):
        write(here / parent / "notes", "README.md", f"{parent}.md")
    assert run("index", "a/notes")[0] == 0
    assert run("index", "a/notes")[0] == 0
    code, _, err = run("index", "b/notes")
    assert code == 2
    assert err.startswith(f'error: notes.index already exists, with the source "{here}/a/notes"')
    assert "--into notes.index" in err
    assert "--into b-notes.index" in err
    assert documents("notes.index") == {"README.md", "a.md"}
    assert run("index", "b/notes", "--into", "b-notes.index")[0] == 0
    assert run("index", "b/notes", "--into", "notes.index")[0] == 0
    assert documents("notes.index") == {"README.md", "a.md", "notes/README.md", "notes/b.md"}
    assert run("index", "b/notes")[0] == 0  # it is there now
    assert len(documents("notes.index")) == 4


def test_a_conflict_is_exit_code_1_and_says_what_to_do(here, run):
    for name in ("a", "b"):
        rows = [{"id": i, "text": f"{i} of {name}"} for i in ("same", name)]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("index", "a.jsonl", "--into", "X")
    code, out, err = run("index", "b.jsonl", "--into", "X")
    assert code == 1
    assert f'1 skipped: the source "{here}/a.jsonl" has a document of this id; --take-over replaces it' in err
    assert f'--source "{here}/a.jsonl"' in err
    assert "1 documents in 1 chunks: 1 added" in out
    code, out, err = run("index", "b.jsonl", "--into", "X", "--json")
    assert (code, json.loads(out)["conflicts"][0]["path"]) == (1, "same")
    assert "1 skipped" in err
    assert run("index", "b.jsonl", "--into", "X", "--take-over")[0] == 0
    assert SearchIndex.open("X").search("same", None, mode="text").hits[0].text == "same of b"


def test_a_new_export_is_given_as_the_state_of_the_old_one(here, run):
    for month, ids in (("01", "abcdefgh"), ("02", "bcdefghi")):
        lines = [json.dumps({"id": i, "text": f"{i} in {month}"}) for i in ids]
        (here / f"export-{month}.jsonl").write_text("\n".join(lines))
    run("index", "export-01.jsonl", "--into", "X", "--source", "export")
    assert run("index", "export-02.jsonl", "--into", "X", "--source", "export")[0] == 0
    assert documents("X") == set("bcdefghi")
    code, out, _ = run("index", "--info", "X")
    assert (code, f"source:   export: 8 documents, read from {here}/export-02.jsonl" in out) == (0, True)


def test_info_lists_the_sources_and_delete_removes_one(here, run):
    for parent in ("a", "b"):
        run("index", str(write(here / parent / "notes", "README.md")), "--into", "X")
    code, out, _ = run("index", "--info", "X")
    assert code == 0
    assert f"source:   {here}/a/notes: 1 documents\n" in out
    assert f'source:   {here}/b/notes: 1 documents, ids begin with "notes/"\n' in out
    listed = json.loads(run("index", "--info", "X", "--json")[1])["sources"]
    assert [(source["name"], source["documents"]) for source in listed] == [
        (f"{here}/{parent}/notes", 1) for parent in ("a", "b")
    ]
    for wrong, said in (
        (("--source", "nix"), 'no source "nix"'),
        ((), "give the ids"),
        (("--source", "x", "id"), "give the ids"),
    ):
        code, _, err = run("delete", "X", *wrong)
        assert (code, said in err) == (2, True)
    code, out, _ = run("delete", "X", "--source", "b/notes")
    assert (code, out) == (0, f"X: the source {here}/b/notes removed, 1 chunks\n")
    assert documents("X") == {"README.md"}


def test_types_are_given_on_the_command_line(here, run):
    films = here / "films.csv"
    films.write_text("id,text,year\na,x,2020\nb,y,2021\n")
    assert run("index", "films.csv", "--into", "X")[0] == 0
    films.write_text("id,text,year\na,x,2020\nb,y,2021\nc,z,unknown\n")
    code, _, err = run("index", "films.csv", "--into", "X")
    assert code == 2
    assert 'films.csv line 4 (document "c")' in err
    assert "--type year=text" in err
    for wrong in ("year", "=text", "year=date"):
        assert run("index", "films.csv", "--into", "X", "--type", wrong)[0] == 2
    assert run("index", "films.csv", "--into", "X", "--type", "year=text")[0] == 0
    code, out, _ = run("search", "X", "x", "--mode", "text", "--where", "year = '2020'", "--json")
    assert [hit["id"] for hit in json.loads(out)["hits"]] == ["a"]
    assert json.loads(out)["hits"][0]["start_line"] == 0
    assert "films.csv:" not in run("search", "X", "x", "--mode", "text")[1]


def test_documents_of_unknown_source_are_told_of(here, run, monkeypatch):
    """As after a migration: here the column is emptied again."""
    write(here / "notes", *EIGHT)
    run("index", "notes", "--into", "X")
    SearchIndex.open("X").table.update(values_sql={"r3_source": "CAST(NULL AS STRING)"})
    shutil.rmtree(here / "notes")
    write(here / "notes", "n0.md", "n1.md")
    code, out, err = run("index", "notes", "--into", "X")
    assert (code, "0 removed" in out) == (0, True)
    assert "6 documents of unknown source" in err
    assert "search-r3 delete X --source unknown" in err
    assert run("delete", "X", "--source", "unknown")[0] == 0
    assert documents("X") == {"n0.md", "n1.md"}


def test_a_moved_folder_is_refused_before_a_model_is_loaded(here, run, monkeypatch):
    write(here / "old/notes", "a.md")
    run("index", "old/notes", "--into", "X")
    (here / "new").mkdir()
    shutil.move(here / "old/notes", here / "new/notes")
    monkeypatch.setattr("search_r3.cli.index.load_fast", lambda *_: pytest.fail("loaded"))
    code, _, err = run("index", "new/notes", "--into", "X")
    assert (code, "Traceback" in err) == (2, False)
    assert f'--source "{here}/old/notes"' in err
