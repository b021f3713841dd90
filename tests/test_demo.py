"""The demo's corpus and page, on a tiny model: what it shows is what it found, anywhere it is printed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from search_r3 import demo
from search_r3.index.source_document import SourceDocument


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library, with everything that must be left out."""
    root = tmp_path / "lib"
    for folder in ("pack/_private", "test"):
        (root / folder).mkdir(parents=True)
    (root / "tool.py").write_text(
        '"""Tools for folders.\n\nThey remove and copy whole trees of files at once.\n"""\n'
        "def remove(path, *, force=False):\n"
        '    """Remove a folder with everything that is in it, however deep.\n\n    >>> remove("x")\n    """\n'
        'def _hidden():\n    """This function is private and so is no part of the corpus."""\n'
        'def terse():\n    """Too short."""\n'
    )
    (root / "pack" / "__init__.py").write_text(
        'class Box:\n    """A box that holds things until somebody takes them out."""\n'
    )
    (root / "pack" / "_private" / "x.py").write_text(
        '"""A private module with a long enough docstring to be taken."""\n'
    )
    (root / "test" / "test_x.py").write_text('"""A test module with a long enough docstring to be taken."""\n')
    (root / "broken.py").write_text("def (:\n")
    return root


def test_the_corpus_is_the_public_documented_part(library):
    found = {d.id: d for d in demo.standard_library(library)}
    assert list(found) == ["pack.Box", "tool", "tool.remove"]
    assert found["tool.remove"].title == "tool.remove(path, *, force=False)"
    assert found["tool.remove"].text == "Remove a folder with everything that is in it, however deep."
    assert found["tool.remove"].line == 5
    assert found["tool"].text == "Tools for folders. They remove and copy whole trees of files at once."


def test_the_real_library_holds_the_answers_within_the_budget():
    library = demo.standard_library()
    chosen = demo.choose(library, lambda text: len(text) // 4)  # as SmolLM2's tokenizer cuts it
    assert {d.id for d in chosen} >= {expected[0] for expected in demo.QUESTIONS.values()}
    assert 800 <= len(chosen) <= demo.MAX_PASSAGES
    assert max(len(d.text) for d in chosen) <= demo.MAX_DOCSTRING
    assert max(len(d.title) - len(d.id) for d in chosen) <= demo.MAX_SIGNATURE


def test_the_choice_keeps_the_budget_and_is_the_same_every_time():
    documents = [SourceDocument(str(i), f"title {i}", "word " * 50) for i in range(3000)]
    chosen = demo.choose(documents, lambda text: 100)
    assert len(chosen) == demo.MAX_TOKENS // (100 + demo.TOKENS_AROUND)
    assert chosen == demo.choose(documents[::-1], lambda text: 100)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_page_is_plain_text_in_a_file_and_fits_its_width(library, tiny_model, tmp_path, monkeypatch, capsys, width):
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    whole = demo.standard_library
    monkeypatch.setattr(demo, "standard_library", lambda: whole(library))
    page = io.StringIO()
    answers = demo.run_demo(str(tiny_model), console=Console(file=page, width=width))
    text = page.getvalue()
    assert "\x1b" not in text
    body, commands = text.split("To ask this index")
    assert max(len(line) for line in body.splitlines()) <= min(width, demo.MAX_WIDTH)
    assert "✗ shutil.rmtree" in body  # which this small library has not
    for answer in answers:
        assert answer.question[:40] in text
        assert answer.on.reasoning.num_tokens <= demo.BUDGET
        assert len(answer.off.hits) == len(answer.on.hits) == 3
    assert "3 embedded in" in " ".join(text.split())
    assert str(tmp_path / "cache" / "demo") in commands  # whole, so that it can be copied
    assert "indexing: 0 of 3" in capsys.readouterr().err
    again = io.StringIO()
    demo.run_demo(str(tiny_model), console=Console(file=again, width=width))
    assert "found in the cache" in again.getvalue()
    said = capsys.readouterr().err
    assert "indexing" not in said  # nothing is: the index was finished
    assert "checking the index in the cache: 0 of 3" in said
    assert "converted" not in said  # a folder of one's own never is


def test_what_a_model_writes_cannot_play_with_the_terminal():
    assert demo.printable("a\x1b[31mb\r\nc\x00 [bold]d") == "a [31mb c [bold]d"


def test_the_expected_answer_is_marked_wherever_it_is_found(library, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    whole = demo.standard_library
    monkeypatch.setattr(demo, "standard_library", lambda: whole(library))
    monkeypatch.setattr(demo, "QUESTIONS", {"remove a folder": ("tool.remove",), "the sea": ("sea.tides",)})
    page = io.StringIO()
    answers = demo.run_demo(str(tiny_model), console=Console(file=page, width=100))
    text = page.getvalue()
    assert demo.found_at(answers[0], answers[0].off) == 1 + [h.id for h in answers[0].off.hits].index("tool.remove")
    assert demo.found_at(answers[1], answers[1].on) is None
    assert text.count("tool.remove ✓") == 2  # three documents, so both sides have it
    assert text.count("✗ sea.tides") == 2
    words = " ".join(text.split())
    assert "the expected answer (✓) is among the first 3 for 1 without reasoning and for 1 with it" in words
