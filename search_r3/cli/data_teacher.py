"""Commands that prepare pairs with another model: `data embed-teacher` and `data select`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from search_r3.cli.options import (
    BatchSize,
    Device,
    Dtype,
    DtypeOption,
    Json,
    MaxLength,
    TrainingPairs,
    print_counted,
    print_json,
    silence_transformers,
)
from search_r3.errors import InputError


def data_embed_teacher(
    pairs: Annotated[list[Path], typer.Argument(readable=False, help="Files of training pairs (JSONL).")],
    output: Annotated[Path, typer.Option("--into", help="The file to write; its name ends in .rows.safetensors.")],
    by: Annotated[
        str, typer.Option(help="The teacher: all-minilm-l6-v2, st:NAME (sentence-transformers), or a SearchR3 model.")
    ] = "all-minilm-l6-v2",
    max_length: MaxLength = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Embed every text of the pairs with a teacher, once, so that training, mining and selection can use its scores.

    If interrupted, the same command resumes. In a recipe, give the file as `teacher`; for `data mine` and
    `data select`, give it instead of a model.

    \b
    Example:  search-r3 data embed-teacher pairs.jsonl --into pairs.rows.safetensors
    Before:   search-r3 data build RECIPE pairs.jsonl
    Next:     search-r3 data select pairs.jsonl best.jsonl --by pairs.rows.safetensors --top 3
    """
    silence_transformers()
    from search_r3.data.mining.scorers import DenseScorer
    from search_r3.data.mining.teacher import SUFFIX, write_teacher_rows

    teacher = None if by == "bm25" or by.endswith(SUFFIX) else _open(by, device, dtype, batch_size, max_length)
    if not isinstance(teacher, DenseScorer):
        raise InputError(f"a teacher must be an embedding model, not {by}; name one such as all-minilm-l6-v2")
    counts = write_teacher_rows(pairs, output, teacher, print_counted)
    if as_json:
        print_json(counts)
    else:
        print(f"{output}: {counts['queries']:,} queries and {counts['documents']:,} documents by {teacher.name}")


def data_select(
    pairs: TrainingPairs,
    output: Annotated[Path, typer.Argument(help="The JSONL file to write.")],
    take: Annotated[
        list[str] | None,
        typer.Option("--take", metavar="KIND=COUNT", help="How many of a kind, such as docstrings=5000. Repeatable."),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="Keep only positives that this ranks high: a file of teacher rows, bm25, or a model."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="The positive must be among the first N of its kind.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed for the choice among the pairs that pass.")] = 0,
    max_length: MaxLength = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Select the best pairs: a number of each kind, and only pairs whose positive ranks high.

    \b
    Example:  search-r3 data select pairs.jsonl best.jsonl --by pairs.rows.safetensors --take docstrings=6000
    Before:   search-r3 data build RECIPE pairs.jsonl
    Next:     search-r3 data mine best.jsonl mined.jsonl
    """
    silence_transformers()
    from search_r3.data.mining.selection import select_pairs

    scorer = _open(by, device, dtype, batch_size, max_length) if by else None
    manifest = select_pairs(pairs, output, _counts(take or []), scorer=scorer, top=top, seed=seed, report=print_counted)
    if as_json:
        print_json(manifest)
        return
    for kind, count in manifest["by_kind"].items():
        print(f"{count:>8,}  {kind}")
    for reason, count in manifest["dropped"].items():
        print(f"{-count:>8,}  {reason}")
    print(f"{manifest['count']:>8,}  pairs in {output}")


def _open(spec: str, device: str | None, dtype: Dtype, batch_size: int, max_length: int | None) -> Any:
    from search_r3.data.mining.scorers import open_scorer

    return open_scorer(spec, device=device, dtype=dtype.value, batch_size=batch_size, max_length=max_length)


def _counts(take: list[str]) -> dict[str, int]:
    counts = {}
    for item in take:
        name, _, count = item.rpartition("=")
        if not name or not count.isdecimal():
            raise InputError(f"--take {item}: expected KIND=COUNT, such as docstrings=5000")
        counts[name] = int(count)
    return counts
