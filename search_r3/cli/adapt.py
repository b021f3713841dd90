"""`adapt`: a query adapter for an index as it stands, from judged queries or clicks."""

from __future__ import annotations

import enum
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search_r3.cli.index_maintenance import Index
from search_r3.cli.options import (
    DataRoot,
    Device,
    Dtype,
    DtypeOption,
    Json,
    load,
    print_json,
    print_progress,
    silence_transformers,
)
from search_r3.cli.train import Resume
from search_r3.errors import InputError
from search_r3.files import atomic_path, atomic_write_text
from search_r3.progress import progress_bar
from search_r3.rank_fusion import DEPTH

if TYPE_CHECKING:
    from search_r3.data.judged_queries import QuerySplit
    from search_r3.index.search_index import SearchIndex
    from search_r3.training.adapt import Adaptation
    from search_r3.training.linear_adapter import WordScores


class Method(enum.StrEnum):
    """What a query adapter for an index learns."""

    linear = "linear"
    lora = "lora"


MODES = {"off": "without reasoning", "on": "with reasoning", "latent": "in latent steps", "read": "with its first hits"}


def adapt(
    index: Index,
    queries: Annotated[
        str,
        typer.Argument(
            help="Judged queries: a BEIR folder or data set, or JSONL with query and relevant (ids of documents, or "
            "id and grade), or query and clicked (ids)."
        ),
    ],
    into: Annotated[Path, typer.Option(help="The new query adapter's folder; INTO.run keeps the training run.")],
    model: Annotated[
        str | None,
        typer.Option(help="What to begin with, of the index's document space; by default the index's model."),
    ] = None,
    split: Annotated[str, typer.Option(help="The split of a BEIR folder to train on.")] = "train",
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="More queries (BEIR folder or JSONL) whose near copies are not trained on. Those of a BEIR folder's "
            "other splits never are."
        ),
    ] = None,
    hold_out: Annotated[
        int, typer.Option(min=2, help="Every N-th query, by its id's CRC-32, is held out to decide what is kept.")
    ] = 8,
    method: Annotated[
        Method,
        typer.Option(
            help="linear: a linear map of the queries' embeddings, fitted in seconds. lora: the weights of the model."
        ),
    ] = Method.linear,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps: 150 by default, with lora 240.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=2, help="Queries per step: 256 by default, with lora 16.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="AdamW's peak learning rate: 5e-4 by default, with lora 2e-4.")
    ] = None,
    teacher: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="With linear: how much the fused order by vectors and words counts, where the judgments count 1; 1 "
            "by default.",
        ),
    ] = None,
    mode_ratio: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Fraction of the queries also trained in the model's other modes: with its own "
            "reasoning, in latent steps, with its first hits.",
        ),
    ] = 0.25,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the queries' order.")] = 0,
    resume: Resume = True,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    data: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Train a query adapter for an index in minutes; the index stays as it is.

    Only queries are trained, against all vectors of the index. Some queries are held out: they decide which step is
    kept, and nothing is saved if none is better than the model before. The same command resumes after Ctrl-C: with
    the reasoning that was written, with lora also from a checkpoint.

    \b
    Example:  search-r3 adapt notes-index clicks.jsonl --into notes-queries
    Before:   search-r3 index PATH --into notes-index
    Next:     search-r3 search notes-index "a query" --model notes-queries
    """
    silence_transformers()
    from search_r3.data.judged_queries import read_excluded_queries, read_judged_queries, split_queries
    from search_r3.export.merged_export import check_target
    from search_r3.index.search_index import SearchIndex
    from search_r3.model.model_info import model_of_index
    from search_r3.model.processor import fastest_dtype
    from search_r3.training.adapt import AdaptSettings, IndexedVectors, adapt_linear, adapt_lora
    from search_r3.training.linear_adapter import LinearSettings

    started = time.monotonic()
    check_target(into)
    given: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    given = {key: value for key, value in given.items() if value is not None}
    given |= {"mode_ratio": mode_ratio, "seed": seed}
    if method is Method.lora:
        if teacher is not None:
            raise InputError("--teacher is for --method linear; LoRA learns from the judgments alone")
        lora = AdaptSettings(**given)
    else:
        linear = LinearSettings(teacher=1.0 if teacher is None else teacher, **given)
    opened = SearchIndex.open(index, follow=False)
    name = model or model_of_index(opened.info.model_name, opened.info.model_source, index)
    vectors = IndexedVectors(*opened.matrix(texts=reads(name)))
    if dtype is Dtype.auto:
        dtype = Dtype(fastest_dtype(device))
    excluded = read_excluded_queries(queries, split, exclude or (), data)
    parts = split_queries(read_judged_queries(queries, split, data), vectors.column_of, hold_out, excluded)
    print_progress(_counts(parts, len(vectors.column_of)))

    def load_checked(which: str) -> Any:
        loaded = load(which, device, dtype)
        opened.check_model(loaded)
        return loaded

    run = into.with_name(f"{into.name}.run")
    if method is Method.lora:
        found = adapt_lora(name, vectors, parts, run, lora, load_checked, resume, print_progress)
    else:
        words = _word_scores(opened) if linear.teacher else None
        found = adapt_linear(name, vectors, parts, run, linear, load_checked, words, resume, print_progress)
    record = {
        "index": str(index),
        "model": name,
        "queries": {"train": len(parts.train), "held_out": len(parts.held_out), "near_copies": parts.near_copies}
        | {"without_documents": parts.without_documents, "unknown_documents": parts.unknown_documents},
        "documents": len(vectors.column_of),
        "before": found.before,
        "after": found.after,
        "better": found.better,
        "worse": found.worse,
        "method": method.value,
        "settings": asdict(lora if method is Method.lora else linear),
        "seconds": round(time.monotonic() - started, 1),
    }
    _save(found, into, record, parts)
    if as_json:
        print_json({"adapter": str(into)} | record)
        return
    print("\n".join(_table(found)))
    print(f"{found.better:,} of {len(parts.held_out):,} held-out queries are better off, {found.worse:,} worse")
    if found.after["on"]["ndcg@10"] < found.before["on"]["ndcg@10"]:
        print("with reasoning it is worse than before: search with --no-reasoning")
    print(f"query adapter: {into}")
    print(f'to search with it: search-r3 search {shlex.quote(str(index))} "QUERY" --model {shlex.quote(str(into))}')


def _word_scores(opened: SearchIndex) -> WordScores | None:
    """A search of the index by words; None if it has none."""
    if opened.full_text not in ("current", "outdated"):
        return None

    def search(texts: Sequence[str]) -> list[dict[str, float]]:
        found = []
        with progress_bar("searching by words", len(texts)) as advance:
            for text in texts:
                hits = opened.search(text, None, mode="text", k=DEPTH).hits
                found.append({hit.document: hit.score for hit in hits})
                advance(1)
        return found

    return search


def reads(model: str) -> bool:
    """Whether a model has a reading mode, by its record; no weights are read."""
    from search_r3.model.checkpoint import read_record
    from search_r3.model.resolve import resolve

    record = read_record(resolve(model))
    return record is not None and record["contract"].get("prompts", {}).get("reading") is not None


def _save(found: Adaptation, into: Path, record: dict[str, Any], parts: QuerySplit) -> None:
    """Write the adapter of the best step to `into`, with its report."""
    import json

    with atomic_path(into) as scratch:
        shutil.copytree(found.folder, scratch)
        atomic_write_text(scratch / "adapt.json", json.dumps(record, indent=2) + "\n")
        lines = [
            f"# {into.name}",
            "",
            f"A query adapter (Search-R3), adapted from `{record['model']}` to an index of {record['documents']:,} "
            f"documents with {len(parts.train):,} queries. On {len(parts.held_out):,} held-out queries, which also "
            "chose the step that was kept:",
            "",
            *_table(found),
        ]
        atomic_write_text(scratch / "README.md", "\n".join(lines) + "\n")


def _counts(parts: QuerySplit, documents: int) -> str:
    said = f"{documents:,} documents; {parts.describe('to train on')}"
    if parts.unknown_documents:
        said += f"; {parts.unknown_documents:,} relevant documents are not in the index"
    return said


def _table(found: Adaptation) -> list[str]:
    """The measures before and after, in Markdown."""
    lines = ["| | before | after |", "|---|---|---|"]
    for mode, values in found.before.items():
        if mode in found.after:
            now = found.after[mode]
            lines += [f"| {name} {MODES[mode]} | {value:.4f} | {now[name]:.4f} |" for name, value in values.items()]
    return lines
