"""A build says how many files of the total are done, how fast, and how long the rest takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from search_r3 import SearchR3
from search_r3.index import build_index
from search_r3.index.build import build_progress
from search_r3.index.build.build_progress import LINE_SECONDS, BuildProgress, in_words, shown_progress
from search_r3.index.build.embedding import embed, prepare
from search_r3.index.readers.path_source import Amount, open_source
from search_r3.model.engines import torch_engine

TOTAL = Amount(100, 1_000_000)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(sizes: list[int], *, new: list[float] | None = None, seconds_per_byte: float = 0.001, upto: int | None = None):
    """The progress after batches of these sizes, one file each, of which the share `new` had to be embedded."""
    clock = Clock()
    progress = BuildProgress(lambda: Amount(len(sizes), sum(sizes)), clock=clock)
    files = size = 0
    for number, given in enumerate(sizes[:upto]):
        share = 1.0 if new is None else new[number]
        files, size = files + 1, size + given
        progress.begin_batch(Amount(files, size), round(100 * share), 100)
        for step in (0.5, 1.0):
            clock.now += 0.5 * given * share * seconds_per_byte
            progress.advance(step)
        progress.end_batch(1)
    return progress


def test_the_time_left_is_right_after_a_tenth_of_the_work():
    progress = run([1000] * 100, upto=10)
    assert progress.seconds_left == pytest.approx(90, rel=0.02)
    assert progress.text.startswith("10 of 100 files, 1,000 chunks embedded, 100.0 chunks/s, about 90 s left")
    assert progress.share == pytest.approx(0.1)


def test_a_resumed_run_does_not_take_the_speed_of_what_was_done_before():
    sizes = [1000] * 100
    progress = run(sizes, new=[0.0] * 50 + [1.0] * 50, upto=60)
    assert progress.seconds_left == pytest.approx(40, rel=0.02)


def test_an_update_of_few_changes_does_not_expect_to_embed_everything():
    progress = run([1000] * 100, new=[0.1] * 100, upto=50)
    assert progress.seconds_left == pytest.approx(5, rel=0.02)


def test_a_slow_build_says_its_rate_by_the_minute():
    progress = run([1000] * 100, upto=10, seconds_per_byte=0.2)
    assert "10 of 100 files, 1,000 chunks embedded, 30.0 chunks/min, about 5.0 h left" in progress.text


def test_progress_is_seen_after_each_forward_pass(tiny: SearchR3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_engine, "TOKENS_A_PASS", 40)
    texts = ["a text of some words"] * 16
    prepared, shares = prepare(tiny, texts, None, 10_000, None), []
    embed(tiny, prepared, texts, None, shares.append)
    assert len(prepared.batches) == 1
    assert len(shares) > 4
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_an_encoder_that_does_not_report_its_passes_is_asked_once_a_batch(model):
    texts, shares = ["a text"] * 4, []
    embed(model, prepare(model, texts, None, 10_000, 2), texts, None, shares.append)
    assert shares == [0.5, 1.0]


def test_without_a_total_there_is_no_estimate():
    clock = Clock()
    progress = BuildProgress(clock=clock)
    progress.begin_batch(Amount(), 10, 10)
    clock.now = 5.0
    progress.end_batch(3)
    assert progress.text == "3 documents, 10 chunks embedded, 2.0 chunks/s"
    assert progress.share is None


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "about 1 s"), (88, "about 88 s"), (600, "about 10 min"), (9000, "about 2.5 h")]
)
def test_a_duration_is_said_roughly(seconds: float, said: str):
    assert in_words(seconds) == said


def test_a_folder_is_measured_as_it_is_read(tmp_path: Path):
    for name, text in (("a.md", "one"), ("b.txt", "two two"), ("c.bin", "ignored"), ("empty.md", "")):
        (tmp_path / name).write_text(text)
    source = open_source(tmp_path)
    assert source.measure() == Amount(3, 10)
    assert len(list(source)) == 2
    assert source.position == source.measure()


@pytest.mark.parametrize("name", ["records.jsonl", "records.csv"])
def test_a_file_of_records_is_measured_in_lines(tmp_path: Path, name: str):
    file = tmp_path / name
    if name.endswith("csv"):
        file.write_text("id,text\n" + "".join(f"{n},text\n" for n in range(5)))
    else:
        file.write_text("".join(json.dumps({"id": str(n), "text": "text"}) + "\n" for n in range(5)))
    source = open_source(file)
    total = source.measure()
    list(source)
    assert source.position == Amount(5, total.size)


@pytest.mark.parametrize("backend", [None, "numpy"])
def test_a_build_reports_every_batch(tmp_path: Path, model, monkeypatch: pytest.MonkeyPatch, backend: str | None):
    (tmp_path / "texts").mkdir()
    for number in range(7):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text number {number}")
    source, shown = open_source(tmp_path / "texts"), []
    progress = BuildProgress(source.measure, lambda progress: shown.append((progress.text, progress.share)))

    class Shown:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> BuildProgress:
            return progress

        def __exit__(self, *_: object) -> None: ...

    for module in ("build_index", "portable_build"):
        monkeypatch.setattr(f"search_r3.index.build.{module}.shown_progress", Shown)
    build_index(tmp_path / "an.index", source, model, commit_every=2, backend=backend)
    shares = [share for _, share in shown]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert shown[-1][0].startswith("7 of 7 files, 7 chunks embedded")


def test_without_a_terminal_a_line_is_reported_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [0.0], []
    monkeypatch.setattr(build_progress.time, "monotonic", lambda: now[0])
    with shown_progress([], lines.append) as progress:
        for seconds in (10.0, LINE_SECONDS + 1.0, LINE_SECONDS + 5.0, 2 * LINE_SECONDS + 2.0):
            now[0] = seconds
            progress.begin_batch(Amount(1, 100), 10, 10)
            progress.end_batch(1)
    assert [line.split(",")[0] for line in lines] == ["1 documents", "3 documents"]
    with shown_progress([], True) as progress:  # a library prints nothing
        now[0] += 10 * LINE_SECONDS
        progress.end_batch(1)
    assert len(lines) == 2
