from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from search_r3.data.mining import teacher as teaching
from search_r3.data.mining.scorers import open_scorer
from search_r3.data.mining.teacher import TeacherRows, write_teacher_rows
from search_r3.data.pairs import TrainingPair, write_pairs
from search_r3.errors import InputError

PAIRS = [
    TrainingPair("a", "read a file", "open and readlines", negatives=("close a socket",)),
    TrainingPair("b", "sort numbers", "quicksort of numbers"),
    TrainingPair("c", "read a file", "path read_text"),
]


class Letters:
    """Counts of letters as unit rows; queries are shifted, so that the two kinds can be told apart."""

    name = "letters"
    identity: ClassVar[dict[str, Any]] = {"retriever": "test"}

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode_document(self, texts: list[str]) -> np.ndarray:
        self.asked += texts
        rows = np.stack([[text.count(chr(97 + i)) + 0.1 for i in range(26)] for text in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def encode_query(self, texts: list[str]) -> np.ndarray:
        return np.roll(self.encode_document(texts), 1, axis=1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs.jsonl", PAIRS)
    return tmp_path / "pairs.jsonl"


def test_every_text_gets_the_teacher_s_row_and_is_encoded_once(source: Path, tmp_path: Path) -> None:
    teacher = Letters()
    counts = write_teacher_rows([source], tmp_path / "x.rows.safetensors", teacher)
    assert counts == {"queries": 2, "documents": 4, "dimensions": 26}
    assert len(teacher.asked) == 6
    rows = TeacherRows(tmp_path / "x.rows.safetensors")
    assert np.allclose(rows.queries(["sort numbers"]), teacher.encode_query(["sort numbers"]), atol=1e-3)
    negative = rows.documents(["close a socket", "path read_text"])
    assert np.allclose(negative, teacher.encode_document(["close a socket", "path read_text"]), atol=1e-3)
    assert np.allclose(np.linalg.norm(negative, axis=1), 1, atol=1e-6)


def test_further_positives_get_a_row(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", [TrainingPair("a", "q", "first", positives=(("second", 1.0),))])
    counts = write_teacher_rows([tmp_path / "pairs.jsonl"], tmp_path / "x.rows.safetensors", Letters())
    assert counts["documents"] == 2
    rows = TeacherRows(tmp_path / "x.rows.safetensors")
    assert np.allclose(rows.documents(["second"]), Letters().encode_document(["second"]), atol=1e-3)


def test_rows_stand_where_a_scorer_is_asked_for(source: Path, tmp_path: Path) -> None:
    write_teacher_rows([source], tmp_path / "x.rows.safetensors", Letters())
    scorer = open_scorer(str(tmp_path / "x.rows.safetensors"))
    scorer.prepare(["open and readlines", "path read_text"], tmp_path)
    expected = (
        Letters().encode_query(["read a file"]) @ Letters().encode_document(["open and readlines", "path read_text"]).T
    )
    assert np.allclose(scorer.score(["read a file"]), expected, atol=2e-3)


def test_a_text_that_was_not_taught_is_named(source: Path, tmp_path: Path) -> None:
    write_teacher_rows([source], tmp_path / "x.rows.safetensors", Letters())
    rows = TeacherRows(tmp_path / "x.rows.safetensors")
    with pytest.raises(InputError, match="no row for the document 'a new text'"):
        rows.documents(["path read_text", "a new text"])
    with pytest.raises(InputError, match="no row for the query"):
        rows.queries(["path read_text"])  # as a document it is there


def test_an_interrupted_teacher_goes_on_with_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teaching, "CHUNK", 1)
    write_teacher_rows([source], tmp_path / "whole.rows.safetensors", Letters())

    class Dying(Letters):
        def encode_document(self, texts: list[str]) -> np.ndarray:
            if len(self.asked) == 4:
                raise KeyboardInterrupt
            return super().encode_document(texts)

    output = tmp_path / "killed.rows.safetensors"
    with pytest.raises(KeyboardInterrupt):
        write_teacher_rows([source], output, Dying())
    assert not output.exists()
    again = Letters()
    write_teacher_rows([source], output, again)
    assert len(again.asked) == 2
    assert output.read_bytes() == (tmp_path / "whole.rows.safetensors").read_bytes()
    assert not Path(f"{output}.partial").exists()


def test_the_rest_of_another_teacher_is_refused(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x.rows.safetensors.partial"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    with pytest.raises(InputError, match=r"another run \(.*teacher, texts_sha256 differ\); remove it"):
        write_teacher_rows([source], tmp_path / "x.rows.safetensors", Letters())


def test_what_is_no_file_of_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.rows.safetensors").write_text("hello")
    for name in ("x.rows.safetensors", "missing.rows.safetensors"):
        with pytest.raises(InputError, match="data embed-teacher"):
            TeacherRows(tmp_path / name)
    with pytest.raises(InputError, match="must end in"):
        write_teacher_rows([tmp_path / "p.jsonl"], tmp_path / "x.npz", Letters())


def test_teach_and_select_from_the_command_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from search_r3.cli import main

    for command, message in (
        (["data", "embed-teacher", str(source), "--into", str(tmp_path / "x.npz")], "must end in"),
        (
            ["data", "embed-teacher", str(source), "--into", str(tmp_path / "x.rows.safetensors"), "--by", "bm25"],
            "embedding model",
        ),
        (["data", "select", str(source), str(tmp_path / "o.jsonl"), "--take", "x"], "KIND=COUNT"),
        (["data", "select", str(source), str(tmp_path / "o.jsonl"), "--take", "cars=3"], "cars=3"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("error:")
        assert message in error
        assert error.count("\n") == 1
    write_teacher_rows([source], tmp_path / "x.rows.safetensors", Letters())
    rows = str(tmp_path / "x.rows.safetensors")
    assert main(["data", "select", str(source), str(tmp_path / "o.jsonl"), "--by", rows, "--top", "2"]) == 0
    assert "pairs in" in capsys.readouterr().out
