"""The live view: words are searched at every key, the model after a pause, and keys choose, take, open and leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from search_r3 import SearchR3
from search_r3.cli import live, main
from search_r3.cli.live_search import LiveSearch, Step
from search_r3.errors import InputError
from search_r3.index.build.build_index import build_index
from search_r3.index.search_index import SearchIndex
from search_r3.index.source_document import SourceDocument

DOCUMENTS = [
    SourceDocument("tides.md", "Tides", "The moon pulls the sea.", path="tides.md", line=1),
    SourceDocument("bread.md", "Bread", "Yeast lets the dough rise.\n\x1b[31mThe sea is far.", path="bread.md", line=1),
    SourceDocument("stars.md", "Stars", "They shine at night.", path="stars.md", line=1),
]
ENTER, ESCAPE, DOWN, UP, OPEN = "\r", "\x1b", "\x1b[B", "\x1b[A", "\x0f"


def answering(steps: list[Step], script: Callable[[LiveSearch], Any]) -> LiveSearch:
    """The search after `script`, a coroutine function, has run."""

    async def run() -> LiveSearch:
        failures: list[BaseException] = []
        found = LiveSearch(steps, lambda: None, failures.append)
        await script(found)
        if failures:
            raise failures[0]
        return found

    return asyncio.run(run())


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came about")


def test_each_step_replaces_the_answer_of_the_one_before() -> None:
    seen: list[Any] = []

    async def script(search: LiveSearch) -> None:
        search._changed = lambda: seen.append((search.result, search.note))
        search.ask(" sea ")
        await until(lambda: search.result == "meaning of sea")
        search.ask("  ")
        await until(lambda: search.result is None)

    steps = [Step(lambda q: f"words of {q}"), Step(lambda q: f"meaning of {q}", lambda: "thinking", 0.01)]  # type: ignore[arg-type, return-value]
    answering(steps, script)
    assert seen == [
        (None, ""), ("words of sea", ""), ("words of sea", "thinking"), ("meaning of sea", ""), (None, "")
    ]  # fmt: skip


def test_only_the_newest_question_is_answered() -> None:
    asked: list[str] = []
    gate = threading.Event()

    def slow(question: str) -> Any:
        asked.append(question)
        assert gate.wait(100)
        return question

    async def script(search: LiveSearch) -> None:
        search.ask("s")
        await until(lambda: asked)
        for question in ("se", "sea", "seal"):
            search.ask(question)
            await asyncio.sleep(0.01)
        gate.set()
        await until(lambda: search.result == "seal")

    assert answering([Step(slow)], script).result == "seal"
    assert asked == ["s", "seal"]  # what waited was dropped

    async def hasty(search: LiveSearch) -> None:
        search.ask("a")
        await asyncio.sleep(0)
        search.ask("b")
        await until(lambda: search.result == "b")

    asked.clear()
    answering([Step(slow, wait=0.2)], hasty)
    assert asked == ["b"]  # no pause after "a"


def test_what_a_person_can_change_is_a_note_and_a_bug_is_not_hidden() -> None:
    def refuse(question: str) -> Any:
        raise InputError(f"not {question}")

    async def script(search: LiveSearch) -> None:
        search.ask("x")
        await until(lambda: search.note)

    assert answering([Step(lambda q: q), Step(refuse)], script).note == "not x"  # type: ignore[arg-type, return-value]

    async def broken(search: LiveSearch) -> None:
        search.start()
        failures = search._failed.__self__  # type: ignore[attr-defined]
        await until(lambda: failures)

    with pytest.raises(ZeroDivisionError):
        answering([Step(lambda q: q, prepare=lambda: 1 / 0)], broken)  # type: ignore[arg-type, return-value]


@pytest.fixture(scope="module")
def index(tiny: SearchR3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live") / "notes-index"
    build_index(folder, DOCUMENTS, tiny, progress=False)
    return folder


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A pipe for keys, in place of the terminal; what is drawn is thrown away."""
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as pipe:
        for user in ("live", "ask"):
            monkeypatch.setattr(f"search_r3.cli.{user}.open_terminal", lambda: (pipe, DummyOutput()))
        yield pipe


def shown(index: Path, keys: Any, *typed: str | Callable[[Any], bool]) -> tuple[Any, Any]:
    """Type the texts, and wait until each condition about the view holds; the view, and the hit that was taken."""
    from prompt_toolkit.output import DummyOutput

    from search_r3.cli.live_view import LiveView

    view = LiveView(live.steps_of(SearchIndex.open(index), None, k=3), lambda _: None, (keys, DummyOutput()))

    async def type_all() -> None:
        for one in typed:
            if isinstance(one, str):
                keys.send_text(one)
            else:
                await until(lambda one=one: one(view))

    real = view.live.start
    view.live.start = lambda: (real(), view.app.create_background_task(type_all()))  # type: ignore[method-assign]
    return view, view.run()


def text(fragments: Any) -> str:
    return "".join(part for _, part in fragments)


def test_hits_are_there_while_one_types_and_enter_takes_the_chosen_one(index: Path, keys: Any) -> None:
    from search_r3.cli.live_view import HERE, hit_lines, passage_of, status

    two = lambda view: len(view.hits) == 2  # noqa: E731
    view, hit = shown(index, keys, "sea", two, DOWN, lambda view: view.chosen == 1, DOWN, ENTER)
    assert hit == view.hits[1]
    result = view.live.result
    other = next(i for i, one in enumerate(view.hits) if one.document == "bread.md")
    assert text(hit_lines(result, 0)).splitlines()[0] == f"1. {view.hits[0].title}"
    assert "words " in text(hit_lines(result, 0))
    passage = passage_of(result, other, None, 12)
    assert "\x1b" not in text(passage)
    assert passage[passage.index(HERE) + 1] == ("class:question", "sea")  # it is scrolled to the word
    assert text(passage).splitlines()[:3] == ["Yeast lets", "the dough", "rise."]
    assert text(status(result, "")).startswith("by words, ")
    assert text(status(result, "wait")) == "wait"
    assert text(status(replace(result, normalized_query="see"), "")).endswith("   searched by meaning as: see")


def test_escape_leaves_and_enter_takes_nothing_where_nothing_was_found(index: Path, keys: Any) -> None:
    from search_r3.cli.live_view import status

    view, hit = shown(index, keys, "zxqv", lambda view: view.live.result, ENTER, ESCAPE)
    assert hit is None
    assert "no chunk has these words" in text(status(view.live.result, ""))


def test_a_file_is_opened_at_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prompt_toolkit")
    from search_r3.cli.live_view import editor_command

    monkeypatch.setenv("EDITOR", "my-editor --wait")
    monkeypatch.delenv("VISUAL", raising=False)
    assert editor_command(tmp_path / "a.md", 12) == ["my-editor", "--wait", "+12", str(tmp_path / "a.md")]
    assert editor_command(tmp_path / "a.pdf", 0) == ["my-editor", "--wait", str(tmp_path / "a.pdf")]
    monkeypatch.delenv("EDITOR")
    with pytest.raises(InputError, match="set the variable EDITOR"):
        editor_command(tmp_path / "a.md", 1)
    with pytest.raises(InputError, match="not on this machine"):
        editor_command(None, 1)


def test_the_model_searches_once_it_is_loaded(tiny: SearchR3, index: Path) -> None:
    opened = SearchIndex.open(index)
    loads: list[bool] = []

    def load() -> SearchR3:
        loads.append(True)
        return tiny

    steps = live.steps_of(opened, load, k=2, reasoning=False, where="path != 'stars.md'")
    assert steps[1].note() == "loading the model ..."
    steps[1].prepare()
    assert steps[1].note() == "searching by meaning ..."
    by_words, by_meaning = (step.search("sea") for step in steps)
    assert (by_words.mode, by_meaning.mode) == ("text", "hybrid")
    assert by_meaning.explanation is not None
    assert {hit.document for hit in by_meaning.hits} == {"tides.md", "bread.md"}
    assert loads == [True]
    (only,) = live.steps_of(SimpleNamespace(backend=SimpleNamespace(capabilities=())), load)  # type: ignore[arg-type]
    assert only.wait == 0


def test_the_command_prints_the_place_of_the_hit(index: Path, keys: Any, capsys: pytest.CaptureFixture[str]) -> None:
    keys.send_text(ESCAPE)
    assert main(["search", str(index), "--interactive", "--mode", "text"]) == 1
    assert capsys.readouterr().out == ""


def test_ask_without_a_question_searches_while_one_types(
    tiny_model: Path, keys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path / "cache"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/tides.md").write_text("# Tides\n\nThe moon pulls the sea.\n")
    taken: list[Any] = []

    def view(steps: list[Step], find_file: Any, terminal: Any) -> Any:
        taken.append(steps[-1].search("sea"))
        return SimpleNamespace(run=lambda question: taken[-1].hits[0])

    monkeypatch.setattr("search_r3.cli.live_view.LiveView", view)
    assert main(["ask", str(tmp_path / "notes"), "--model", str(tiny_model), "--no-reasoning"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'notes/tides.md'}:3\n"
    assert main(["ask", str(tmp_path / "notes"), "--model", str(tiny_model), "--no-reasoning"]) == 0  # now up to date
    assert taken[0].hits == taken[1].hits


def test_what_the_view_cannot_do_is_one_line(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("prompt_toolkit")
    for arguments, said in (
        (["search", str(index)], "the query is missing"),
        (["search", str(index), "-i", "--json"], "--json needs one question"),
        (["search", str(index), "-i"], "needs a terminal"),
        (["ask", str(index)], "needs a terminal"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
