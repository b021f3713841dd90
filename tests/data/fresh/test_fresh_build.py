"""The whole set: dated, filtered by a committee, the same bytes for the same seed, resumed, never over other files."""

from __future__ import annotations

import json
from pathlib import Path

import fresh_packages as made
import pytest

from search_r3.cli import main
from search_r3.data.beir import load_beir
from search_r3.data.fresh.fresh_config import FreshConfig, Source
from search_r3.data.fresh.fresh_dataset import build_fresh
from search_r3.data.mining.word_overlap import words_of
from search_r3.data.synthesis.writers import Reply, Usage
from search_r3.errors import InputError

OTHER = {
    "rigging/knots.py": '''
def load_limit(rope, knot):
    """Estimate breaking load of knotted rope under shock.

    Each knot weakens a rope by a share that is known from tests, and a sudden load doubles what the rope must hold.
    """
    weakened = rope.strength * (1 - LOSS[knot])
    return weakened / 2 if rope.shock else weakened
'''
}


def build(folder: Path, *paths: Path, opened=made.Words, **settings):
    sources = settings.pop("packages", tuple(Source(str(path)) for path in paths))
    extra = {key: settings.pop(key) for key in ("lookup", "writer", "force") if key in settings}
    config = FreshConfig(sources, **{"committee": ("one", "two"), **settings})
    return build_fresh(config, folder, **{"lookup": lambda name: None, "open_scorer": opened, **extra})


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    readme = "# rigging\n\nRopes and knots on sailing ships, with what each of them holds.\n"
    return made.wheel(tmp_path), made.wheel(tmp_path, "rigging", "0.1", OTHER, readme)


def test_a_set_is_a_beir_folder_with_its_origin(tmp_path, two):
    first = made.listing(two[0], "2026-05-05", **{"tidewater-1.0.tar.gz": "2025-01-01"})
    manifest = build(tmp_path / "set", *two, lookup=lambda name: first if name == "tidewater" else None)
    data = load_beir(tmp_path / "set", "test")
    assert len(data.corpus) == manifest["documents"] == 10
    assert len(data.queries) == manifest["questions"] > 3
    assert all(list(judged.values()) == [1] for judged in data.qrels.values())
    for query, judged in data.qrels.items():
        text = " ".join(words_of(data.corpus[next(iter(judged))].full_text))
        assert f" {' '.join(words_of(data.queries[query]))} " not in f" {text} "
    tidewater, rigging = manifest["packages"]
    assert (tidewater["version"], tidewater["license"], tidewater["sha256"]) == ("2.0", "MIT", made.sha256(two[0]))
    assert (tidewater["released"], tidewater["date_from"]) == ("2026-05-05", "index")
    assert (tidewater["first_released"], rigging["first_released"]) == ("2025-01-01", None)
    assert rigging["date_from"] == "archive"
    assert tidewater["dropped"]["heading that fits many sections"] >= 1  # Installation
    assert tidewater["dropped"]["heading with a version or date"] == 1
    note = (tmp_path / "set" / "SOURCE.txt").read_text()
    assert "rigging 0.1  2026-05-04  MIT" in note
    assert str(tmp_path) not in note + (tmp_path / "set" / "manifest.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".whl") == ["set"]


def test_the_same_seed_gives_the_same_bytes_and_another_one_not(tmp_path, two):
    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    build(tmp_path / "a", *two)
    build(tmp_path / "b", *two)
    build(tmp_path / "c", *two, seed=1)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a")["queries.jsonl"] != content(tmp_path / "c")["queries.jsonl"]
    assert content(tmp_path / "a")["corpus.jsonl"] == content(tmp_path / "c")["corpus.jsonl"]


def test_a_question_is_kept_if_any_of_the_committee_finds_it(tmp_path, two):
    one_blind = build(tmp_path / "a", *two, opened=lambda name: made.Words(name, blind=name == "two"))
    told = one_blind["round_trip"]["committee"]
    assert told["two"]["kept_that_it_finds"] == 0
    assert told["one"]["kept_that_it_alone_finds"] == one_blind["questions"]
    assert one_blind["round_trip"]["found_by_all"] == 0
    with pytest.raises(InputError, match="no retriever answers"):
        build(tmp_path / "b", *two, opened=lambda name: made.Words(name, blind=True))
    strict = build(tmp_path / "c", *two, top=1)
    trip = strict["round_trip"]
    assert trip["checked"] == trip["found_by_any"] + trip["found_by_none"]
    assert strict["dropped"].get("question that no retriever answers", 0) == trip["found_by_none"]
    assert strict["documents"] == one_blind["documents"]  # the documents of dropped questions are distractors


def test_old_and_undated_packages_are_refused(tmp_path):
    old = made.wheel(tmp_path, date=(2025, 6, 1, 0, 0, 0))
    with pytest.raises(InputError, match=r"2025-06-01.*before 2026-01-01"):
        build(tmp_path / "set", old)
    undated = made.wheel(tmp_path, version="3.0", date=(1980, 1, 1, 0, 0, 0))
    with pytest.raises(InputError, match="allow-unknown-date"):
        build(tmp_path / "set", undated)
    assert not (tmp_path / "set").exists()
    manifest = build(tmp_path / "set", undated, allow_unknown_date=True)
    assert manifest["dates"] == {"unknown": 1}
    assert manifest["packages"][0]["released"] is None
    assert "not known" in (tmp_path / "set" / "SOURCE.txt").read_text()
    assert build(tmp_path / "older", old, released_after="2025-01-01")["questions"]


def test_what_an_older_release_says_too_is_left_out(tmp_path):
    old = made.wheel(tmp_path, version="1.0", date=(2024, 1, 1, 0, 0, 0))
    more = (
        "\n## Measuring harbour seiches\n\n" + "A basin rings like a bell after a squall, with periods of minutes. " * 4
    )
    new = made.wheel(tmp_path, version="2.0", readme=made.README + more)
    manifest = build(tmp_path / "set", packages=(Source(str(new), older=(str(old),)),))
    assert manifest["documents"] == manifest["questions"] == 1
    assert manifest["dropped"]["document that an older package has"] == 9


def test_copies_are_one_document_and_numbers_are_bounded(tmp_path):
    files = {**made.FILES, "tidewater/again.py": made.CODE}
    path = made.wheel(tmp_path, files=files)
    manifest = build(tmp_path / "all", path)
    assert manifest["documents"] == 9
    assert manifest["dropped"]["document, exact duplicate"] == 4
    few = build(tmp_path / "few", path, documents_per_package=6, questions_per_package=2)
    assert (few["documents"], few["questions"]) == (6, 2)
    with pytest.raises(InputError, match="twice"):
        build(tmp_path / "twice", path, path)


def test_a_finished_set_is_not_made_again_nor_lost(tmp_path, two):
    made_once = build(tmp_path / "set", *two)
    assert build(tmp_path / "set", *two, opened=None) == made_once  # no retriever is opened
    with pytest.raises(InputError, match="other inputs"):
        build(tmp_path / "set", two[0])
    assert json.loads((tmp_path / "set" / "manifest.json").read_text()) == made_once
    assert len(build(tmp_path / "set", two[0], force=True)["packages"]) == 1
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="other files"):
        build(mine, *two, force=True)
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_run_leaves_nothing_half_done_and_goes_on(tmp_path, two):
    encoded: list[str] = []

    class Slow(made.Words):
        def prepare(self, documents, folder, report=None):
            if not (folder / "rows").exists():
                encoded.append(self.name)
                (folder / "rows").write_text("kept")
            super().prepare(documents, folder)

    def dies(name):
        if name == "two":
            raise KeyboardInterrupt
        return Slow(name)

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "set", *two, opened=dies)
    assert not (tmp_path / "set").exists()
    build(tmp_path / "set", *two, opened=Slow)
    assert encoded == ["one", "two"]
    assert not (tmp_path / "set.partial").exists()


class Author:
    """Writes a question for every document, and counts how often it is asked."""

    name, batch = "author", 4
    identity = {"writer": "test"}  # noqa: RUF012

    def __init__(self) -> None:
        self.usage, self.asked = Usage(), 0

    def write(self, prompts):
        self.asked += len(prompts)
        return [Reply(f"Query: which harbour secret number {self.asked}-{n} matters most") for n in range(len(prompts))]


def test_an_llm_can_write_the_questions_and_the_committee_checks_them_too(tmp_path, two):
    author = Author()
    manifest = build(tmp_path / "set", *two, writer=author, top=100)
    assert manifest["questions_from"] == {"writer": "test"}
    assert author.asked == 10
    queries = load_beir(tmp_path / "set", "test").queries
    assert queries
    assert all("secret" in text for text in queries.values())


def test_the_command(tmp_path, two, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["data", "fresh", *map(str, two), "--into", "set", "--no-index", "--committee", "bm25", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 10
    assert main([*command[:-1], "--seed", "0"]) == 0
    assert "documents and questions in set" in capsys.readouterr().out
    assert main(["data", "fresh", "none.whl", "--into", "other"]) == 2
    assert capsys.readouterr().err.startswith("error: none.whl does not exist")
    assert main(["data", "fresh", str(two[0]), "--into", "other", "--endpoint", "http://localhost:1/v1"]) == 2
    assert "--model" in capsys.readouterr().err
    assert main(["data", "fresh", "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example:  search-r3 data fresh" in text
    assert "Next:" in text


def test_the_recipe_in_configs_can_be_read():
    from search_r3.data.fresh.fresh_config import read_config

    recipe = Path(__file__).parents[3] / "configs" / "data" / "fresh-2026.yaml"
    config = read_config([str(recipe)])
    assert len(config.packages) == 16
    assert all(one.sha256 and one.released and one.released >= config.released_after for one in config.packages)
