"""`search-r3 search` with a reranker, a minimal score, and files as its output. The index needs no model: mode text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from search_r3 import SearchR3
from search_r3.cli import main
from search_r3.index import build_index, open_source
from search_r3.rerankers.cross_encoder import CrossEncoderReranker

NOTES = {
    "trains.md": "# Trains\n\nThe train to Vienna leaves at nine. A train is fast.\n",
    "night.md": "# Night\n\nThe night train leaves from the old station, at eleven.\n",
    "bread.md": "# Baking\n\nBread needs flour, water and yeast. No train goes there.\n",
}


@pytest.fixture(scope="module")
def notes_index(tiny: SearchR3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notes")
    (folder / "notes").mkdir()
    for name, text in NOTES.items():
        (folder / "notes" / name).write_text(text, encoding="utf-8")
    build_index(folder / "notes-index", open_source(folder / "notes"), tiny, progress=False)
    return folder / "notes-index"


def hits(index: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict]:
    assert main(["search", str(index), "train", "--mode", "text", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)["hits"]


def test_the_reranker_chooses_among_the_first_hits(
    notes_index: Path, tiny_cross_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = hits(notes_index, capsys)
    reranked = hits(notes_index, capsys, "--rerank", "3", "--reranker", str(tiny_cross_encoder), "-k", "2")
    texts = [f"{hit['title']} {hit['text']}" for hit in plain]
    scores = CrossEncoderReranker(tiny_cross_encoder, "cpu").score("train", texts)
    assert [hit["id"] for hit in reranked] == [plain[i]["id"] for i in scores.best(2)]
    assert [hit["score"] for hit in reranked] == pytest.approx([scores.relevance[i] for i in scores.best(2)], abs=1e-5)
    options = ["--rerank", "3", "--reranker", str(tiny_cross_encoder), "-k", "1", "--mode", "text"]
    assert main(["search", str(notes_index), "train", *options]) == 0
    assert f"relevance {scores.relevance.max():.2f}, words" in capsys.readouterr().out


def test_lower_scores_are_left_out(notes_index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = [hit["score"] for hit in hits(notes_index, capsys)]
    assert len(scores) == 3
    between = (scores[0] + scores[-1]) / 2
    assert [hit["score"] for hit in hits(notes_index, capsys, "--min-score", str(between))] == scores[:1]
    command = ["search", str(notes_index), "train", "--mode", "text", "--min-score", "99"]
    assert main(command) == 1
    assert capsys.readouterr().out == f"nothing found: the best score is {scores[0]:.3g}, below --min-score 99\n"
    assert main([*command, "--files"]) == 1
    assert capsys.readouterr().out == ""


def test_only_files_are_printed(notes_index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = [hit["path"] for hit in hits(notes_index, capsys)]
    assert main(["search", str(notes_index), "train", "--mode", "text", "--files", "--chunks"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [Path(line).name for line in printed] == order
    assert all(Path(line).is_file() for line in printed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rerank", "5"], "give both"),
        (["--reranker", "x"], "give both"),
        (["--rerank", "3", "--reranker", "x"], "rerank is 3; give how many hits to rerank, from k (5) to 1,000"),
        (["--rerank", "5", "--reranker", "./nowhere"], "no cross-encoder at ./nowhere"),
        (["--files", "--json"], "give one"),
    ],
)
def test_contradictions_are_one_line(
    notes_index: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(notes_index), "train", "--mode", "text", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
