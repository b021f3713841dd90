"""The screen of a search while one types: the question, its hits, and the passage of the chosen hit.

Arrow keys choose, Enter ends with the chosen hit, Ctrl-O opens its file in the editor, Esc leaves. It is drawn by
prompt_toolkit.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from search_r3.cli.live_search import LiveSearch, Step
from search_r3.errors import InputError
from search_r3.index.results.places import place_of
from search_r3.index.results.terminal_page import nothing_found, one_line, scores_of, searched_as, warnings_of
from search_r3.index.run_search import Hit, SearchResult
from search_r3.optional import optional_imports

WIDE = 100
"""Columns from which the passage stands beside the hits, and not below them."""
PAGE = 400
"""Characters by which Page Up and Page Down move in a passage."""
KEYS = "↑ ↓ choose   Enter takes   Ctrl-O opens in $EDITOR   PgUp PgDn read on   Esc leaves"
STYLE = {
    "prompt": "bold ansicyan", "dim": "ansibrightblack", "chosen": "reverse", "title": "bold",
    "note": "ansiyellow", "question": "bold ansiyellow", "reasoning": "bold ansicyan",
}  # fmt: skip
HERE = ("[SetCursorPosition]", "")
"""The fragment that a window scrolls to."""
Fragments = list[tuple[str, str]]
"""(style, text) pairs, as prompt_toolkit takes them."""


class LiveView:
    """The screen, and what keys do.

    Args:
        steps: how to search, see `LiveSearch`.
        find_file: the file of a hit's path.
        terminal: prompt_toolkit's input and output; those of its session if None.
    """

    def __init__(
        self, steps: list[Step], find_file: Callable[[str], Path | None], terminal: tuple[Any, Any] = (None, None)
    ) -> None:
        with optional_imports("interactive", "searching while one types"):
            from prompt_toolkit.application import Application
            from prompt_toolkit.buffer import Buffer
            from prompt_toolkit.styles import Style
        self._find_file = find_file
        self._kept: str | None = None  # the id of the hit that was chosen by a key
        self.chosen = 0
        self.at: int | None = None
        """Where the passage is read, in characters; None is at its first mark."""
        self.buffer = Buffer(multiline=False, on_text_changed=lambda _: self._ask())
        self.app: Application[Hit | None] = Application(
            layout=self._layout(), key_bindings=self._keys(), style=Style.from_dict(STYLE), full_screen=True,
            input=terminal[0], output=terminal[1],
        )  # fmt: skip
        self.app.ttimeoutlen = self.app.timeoutlen = 0.05  # Esc alone acts at once
        self.live = LiveSearch(steps, self._changed, lambda error: self.app.exit(exception=error))

    def run(self, question: str = "") -> Hit | None:
        """Show the screen until a key ends it; the hit that Enter took, or None.

        Raises:
            Exception: a search failed by anything but InputError.
        """

        def begin() -> None:
            self.live.start()
            self.buffer.text = question
            self.buffer.cursor_position = len(question)

        return self.app.run(pre_run=begin)

    # ------------------------------------------------------------------------------------------------------ the state

    @property
    def hits(self) -> Sequence[Hit]:
        """The hits on the screen."""
        return self.live.result.hits if self.live.result is not None else ()

    @property
    def hit(self) -> Hit | None:
        """The chosen hit; None without hits."""
        return self.hits[self.chosen] if self.hits else None

    def _ask(self) -> None:
        self._kept, self.chosen, self.at = None, 0, None
        self.live.ask(self.buffer.text)

    def _changed(self) -> None:
        """Keep the hit that was chosen, if the new list has it."""
        names = [hit.id for hit in self.hits]
        if self._kept in names:
            self.chosen = names.index(self._kept)
        else:
            self.chosen, self.at = 0, None
        self.app.invalidate()

    def choose(self, number: int) -> None:
        """Choose a hit by its place in the list; the nearest one if there is none."""
        self.chosen, self.at = max(0, min(number, len(self.hits) - 1)), None
        self._kept = self.hit.id if self.hit else None

    def read_on(self, characters: int) -> None:
        """Move in the passage."""
        if self.hit is not None:
            at = first_mark(self.live.result, self.chosen) if self.at is None else self.at
            self.at = max(0, min(at + characters, len(self.hit.text)))
            self._kept = self.hit.id

    # ------------------------------------------------------------------------------------------------------ the screen

    def _layout(self) -> Any:
        from prompt_toolkit.application import get_app
        from prompt_toolkit.layout import DynamicContainer, FormattedTextControl, HSplit, Layout, VSplit, Window
        from prompt_toolkit.layout.controls import BufferControl
        from prompt_toolkit.layout.processors import BeforeInput

        def shown(text: Callable[[], Any], **options: Any) -> Window:
            return Window(FormattedTextControl(text), ignore_content_width=True, **options)

        hits = shown(lambda: hit_lines(self.live.result, self.chosen))
        passage = shown(lambda: passage_of(self.live.result, self.chosen, self.at, self._width()), wrap_lines=True)
        beside = VSplit([hits, Window(width=1, char="│", style="class:dim"), passage], padding=1)
        below = HSplit([hits, Window(height=1, char="─", style="class:dim"), passage])
        question = Window(BufferControl(self.buffer, input_processors=[BeforeInput("> ", "class:prompt")]), height=1)
        return Layout(
            HSplit(
                [
                    question,
                    shown(lambda: status(self.live.result, self.live.note), height=1),
                    DynamicContainer(lambda: beside if get_app().output.get_size().columns >= WIDE else below),
                    shown(lambda: [("class:dim", KEYS)], height=1),
                ]
            ),
            focused_element=question,
        )

    def _width(self) -> int:
        """Columns of the passage."""
        columns = self.app.output.get_size().columns
        return (columns - 4) // 2 if columns >= WIDE else columns

    def _keys(self) -> Any:
        from prompt_toolkit.key_binding import KeyBindings

        keys = KeyBindings()

        def on(*names: str) -> Callable[[Callable[[], object]], None]:
            def add(act: Callable[[], object]) -> None:
                for name in names:
                    keys.add(name)(lambda _: act())

            return add

        on("up", "c-p", "s-tab")(lambda: self.choose(self.chosen - 1))
        on("down", "c-n", "tab")(lambda: self.choose(self.chosen + 1))
        on("pageup")(lambda: self.read_on(-PAGE))
        on("pagedown")(lambda: self.read_on(PAGE))
        on("enter")(lambda: self.hit and self.app.exit(result=self.hit))
        on("c-o")(self._open)
        on("escape", "c-c", "c-d")(lambda: self.app.exit(result=None))
        return keys

    def _open(self) -> None:
        """Open the file of the chosen hit in the editor, then come back."""
        from prompt_toolkit.application import run_in_terminal

        file = self._find_file(self.hit.path) if self.hit else None
        try:
            command = editor_command(file, self.hit.snippet_line if self.hit else 0)
        except InputError as error:
            self.live.note = str(error)
        else:
            run_in_terminal(lambda: subprocess.run(command, check=False))


def editor_command(file: Path | None, line: int) -> list[str]:
    """The command that opens `file` at `line` in the editor of the variables VISUAL or EDITOR.

    Raises:
        InputError: there is no such file, or no editor is set.
    """
    if file is None:
        raise InputError("the file of this hit is not on this machine")
    editor = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "")
    if not editor:
        raise InputError("set the variable EDITOR to the editor that opens files")
    return [*editor, *([f"+{line}"] if line > 0 else []), str(file)]


def status(result: SearchResult | None, note: str) -> Fragments:
    """The line below the question: what is going on; else what is odd about the hits, or how they were found."""
    if note:
        return [("class:note", one_line(note))]
    if result is None:
        return [("class:dim", "Type a question: words are searched at once, the meaning when you pause.")]
    if not result.hits:
        return [("class:note", nothing_found(result))]
    if odd := "; ".join(filter(None, warnings_of(result))):
        return [("class:note", odd)]
    spent = result.timings.reason_ms + result.timings.search_ms
    parts: Fragments = [("class:dim", f"{'by words' if result.mode == 'text' else 'by meaning'}, {spent:,.0f} ms")]
    if corrected := searched_as(result):
        parts.append(("class:dim", f"   {corrected}"))
    if result.reasoning is not None:
        parts += [("class:dim", "   reasoning: "), ("italic", one_line(result.reasoning.text))]
    return parts


def hit_lines(result: SearchResult | None, chosen: int) -> Fragments:
    """Two lines for each hit: its title, then its place and scores."""
    lines: Fragments = []
    for number, hit in enumerate(result.hits if result else ()):
        style = " class:chosen" if number == chosen else ""
        lines += [HERE] if style else []
        lines.append((f"class:title{style}", f"{number + 1}. {one_line(hit.title or hit.document)}"))
        place = one_line(place_of(hit.path, hit.snippet_line, hit.metadata))
        lines.append(("class:dim", "   ".join(["\n", *filter(None, (place, scores_of(hit)))]) + "\n"))
    return lines


def passage_of(result: SearchResult | None, chosen: int, at: int | None, width: int) -> Fragments:
    """The text of the chosen hit with its marks, folded at `width` characters, to be scrolled to `at`, by default the
    first mark."""
    if result is None or not result.hits:
        return []
    hit = result.hits[chosen]
    text = folded("".join(c if c.isprintable() or c == "\n" else " " for c in hit.text), width)
    marks = result.explanation.hits[chosen].marks if result.explanation is not None else []
    here = first_mark(result, chosen) if at is None else at
    ends = sorted({0, here, len(text), *(end for start, stop, _ in marks for end in (start, stop))})
    parts: Fragments = []
    for start, end in zip(ends, [*ends[1:], len(text)], strict=True):
        kind = next((kind for first, last, kind in marks if first <= start and end <= last), "")
        parts += [HERE] if start == here else []
        parts.append((f"class:{kind}" if kind else "", text[start:end]))
    return parts


def folded(text: str, width: int) -> str:
    """`text` with line breaks in place of spaces where a line is longer than `width` characters; its length stays."""
    return re.sub(rf"(?=[^\n]{{{width + 1}}})([^\n]{{1,{width}}}) ", "\\1\n", text)


def first_mark(result: SearchResult | None, chosen: int) -> int:
    """Where the first marked word of a hit begins; 0 without one."""
    if result is None or result.explanation is None:
        return 0
    return min((start for start, _, _ in result.explanation.hits[chosen].marks), default=0)
