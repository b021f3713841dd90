from __future__ import annotations

import json
from pathlib import Path

import pytest

from search_r3.errors import InputError
from search_r3.training.plot import plot_run, read_log


def write_log(folder: Path, records: list[dict]) -> Path:
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_run_is_drawn_while_it_has_little_to_show(tmp_path: Path) -> None:
    run = write_log(
        tmp_path / "run", [{"step": 1, "loss": 2.0, "terms": {"infonce": 2.0}, "lr": 0.1, "grad_norm": 1.0}]
    )
    assert plot_run(run) == run / "curves.png"
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_steps_and_dev_records_are_told_apart(tmp_path: Path) -> None:
    run = write_log(tmp_path / "run", [{"step": 0, "dev": {"x.off": 0.5}}, {"step": 1, "loss": 1.0, "terms": {}}])
    steps, dev = read_log(run)
    assert [r["step"] for r in steps] == [1]
    assert dev[0]["dev"] == {"x.off": 0.5}


@pytest.mark.parametrize(("text", "message"), [("{", "line 1"), ("", "no step yet"), ('{"loss": 1}\n', "line 1")])
def test_a_broken_log_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        plot_run(tmp_path)


def test_a_missing_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        plot_run(tmp_path / "nothing")
