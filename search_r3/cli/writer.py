"""The option --writer: another model writes the reasoning about queries, and its cost is shown on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search_r3.cli.options import Dtype, print_progress
from search_r3.errors import InputError

if TYPE_CHECKING:
    from search_r3.data.reasoning.reasoning_writer import ReasoningWriter

WriterOption = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Have another model write the reasoning: endpoint:MODEL@URL (OpenAI-compatible; the key is read from "
        "OPENAI_API_KEY) or a local chat model. Replies are cached, and the cost is shown.",
    ),
]


def refuse_both(writer: str | None, reasoning_text: str | None) -> None:
    """Raise InputError if the reasoning is both given and to be written."""
    if writer is not None and reasoning_text is not None:
        raise InputError("give either --writer or --reasoning-text, not both")


def open_reasoning_writer(writer: str, device: str | None, dtype: Dtype) -> ReasoningWriter:
    """The writer with its cache. Raises InputError as `reasoning_writer.open_writer`."""
    from search_r3.data.reasoning.reasoning_writer import ReasoningWriter, open_writer

    return ReasoningWriter(open_writer(writer, device=device, dtype=dtype.value))


def write_reasoning(
    writer: str, queries: Sequence[str], device: str | None, dtype: Dtype
) -> tuple[list[str], dict[str, Any]]:
    """The reasoning about each query, and what it cost (`Written.cost`), which is also printed on stderr."""
    written = open_reasoning_writer(writer, device, dtype).write(queries)
    print_progress(written.line)
    return written.texts, written.cost
