"""`search --interactive`, and `ask` without a question: an index that is searched while one types."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import typer

from search_r3.cli.live_search import PAUSE, Step
from search_r3.cli.options import EXIT_NOTHING_FOUND
from search_r3.errors import InputError
from search_r3.optional import optional_imports

if TYPE_CHECKING:
    from search_r3.index.encoder_protocol import Encoder
    from search_r3.index.run_search import Hit, SearchOptions
    from search_r3.index.search_index import SearchIndex


def search_live(
    opened: SearchIndex,
    load: Callable[[], Encoder] | None,
    question: str,
    find_file: Callable[[str], Path | None],
    **options: Unpack[SearchOptions],
) -> None:
    """Show the live view, then print the file and line of the hit that was taken; exit code 1 if none was.

    Args:
        load: returns the model, and is called in a thread while words are searched already; None searches by words
            only.
        options: of the searches with the model; by words, only `k`, `where` and `chunks` count.

    Raises:
        InputError: there is no terminal, or prompt_toolkit is missing.
    """
    from search_r3.cli.live_view import LiveView

    terminal = open_terminal()
    with redirect_stderr(io.StringIO()) as said:  # what libraries print would be drawn over
        hit = LiveView(steps_of(opened, load, **options), find_file, terminal).run(question)
    print(said.getvalue(), end="", file=sys.stderr)
    if hit is None:
        raise typer.Exit(EXIT_NOTHING_FOUND)
    print(place_to_open(hit, find_file))


def check_options(live: bool, question: str | None, **of_one_question: object) -> None:
    """Check what a command was given.

    Args:
        live: whether to search while the user types.
        of_one_question: option -> value, for options that the live view does not have.

    Raises:
        InputError: there is neither a question nor a live view, or one of those options is given to the view.
    """
    if not live and question is None:
        raise InputError(
            "the query is missing; give one, or search while you type with --interactive (see search-r3 search --help)"
        )
    for name, value in of_one_question.items():
        if live and value is not None and value is not False:
            raise InputError(f"--{name.replace('_', '-')} needs one question, not a search while you type")


def open_terminal() -> tuple[Any, Any]:
    """prompt_toolkit's input and output, which is standard error: standard output is for what was chosen."""
    with optional_imports("interactive", "searching while one types"):
        from prompt_toolkit.input import create_input
        from prompt_toolkit.output import create_output
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InputError("searching while one types needs a terminal; give the question on the command line")
    return create_input(), create_output(stdout=sys.stderr)


def steps_of(opened: SearchIndex, load: Callable[[], Encoder] | None, **options: Unpack[SearchOptions]) -> list[Step]:
    """By words at once, as far as the index has a full text; then with the model, after a pause."""
    from search_r3.index.index_handle import damage_explained

    by_words: SearchOptions = {"mode": "text", "explained": True}
    for name in ("k", "where", "chunks"):
        if name in options:
            by_words[name] = options[name]

    def search(question: str, model: Encoder | None, how: SearchOptions) -> Any:
        with damage_explained(opened.path):
            return opened.search(question, model, **how)

    steps = []
    if "text" in opened.backend.capabilities and opened.full_text != "missing":
        steps.append(Step(lambda question: search(question, None, by_words)))
    if load is not None:
        model = cache(load)
        steps.append(
            Step(
                lambda question: search(question, model(), {**options, "explained": True}),
                lambda: "searching by meaning ..." if model.cache_info().currsize else "loading the model ...",
                PAUSE if steps else 0.0,
                model,
            )
        )
    return steps


def place_to_open(hit: Hit, find_file: Callable[[str], Path | None]) -> str:
    """The hit's file with its line, as editors and compilers write it; the path in the index if it is not here."""
    from search_r3.index.results.places import place_of

    file = find_file(hit.path) if hit.path else None
    return place_of(str(file or hit.path or hit.id), hit.snippet_line if hit.path else 0, hit.metadata)
