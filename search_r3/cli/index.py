"""`search-r3 index`: makes a corpus searchable or updates its index; questions and messages about sources."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search_r3.cli.index_maintenance import (
    DUPLICATES_REMOVED,
    FULL_TEXT_REBUILT,
    show_info,
    warn_of_differing_rows,
)
from search_r3.cli.index_ray import Ray, Workers, index_on_ray
from search_r3.cli.options import (
    AUTO,
    Device,
    Dtype,
    DtypeOption,
    EngineOption,
    Json,
    Model,
    expand_home,
    load,
    print_json,
    silence_transformers,
)
from search_r3.errors import InputError

if TYPE_CHECKING:
    from search_r3.index.build.build_report import IndexReport, Removal
    from search_r3.index.readers.path_source import PathSource
    from search_r3.index.search_index import SearchIndex

EXIT_CONFLICTS = 1
"""`index`: documents were left out, as another source has their ids."""


def index(
    path: Annotated[
        str,
        typer.Argument(
            callback=expand_home,
            help="A folder of text files, a BEIR folder, or a file; with --info, an index's folder.",
        ),
    ],
    into: Annotated[
        str | None, typer.Option(callback=expand_home, help="The index's folder; by default NAME.index here.")
    ] = None,
    model: Model = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a chunk with its title (512 by default).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most texts in one pass; by default only the tokens are limited.")
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in one pass; lower it if memory runs out.")
    ] = 16384,
    commit_every: Annotated[
        int | None, typer.Option(min=1, help="Chunks per commit; by default what ten seconds give, 256 to 8,192.")
    ] = None,
    delimiter: Annotated[
        str | None,
        typer.Option(
            help="The delimiter of a CSV file, if it is not detected correctly: a character, tab or semicolon."
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The source's name, independent of where PATH is; by default its absolute path. A run replaces "
            "and removes only documents of its own source.",
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the documents that PATH no longer has.")] = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Remove the documents that PATH no longer has, however many; without it, more than a tenth of the "
            "source are removed only if you confirm on a terminal.",
        ),
    ] = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Replace documents of other sources that have the same ids.")
    ] = False,
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            metavar="FIELD=TYPE",
            help="The type of a field: text, integer, number or true/false. A column of another type is converted. "
            "Repeatable.",
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How a new index is stored: lance (the default), numpy (one file, vectors only), or that of another "
            "package. An index keeps its backend.",
        ),
    ] = None,
    ray: Ray = None,
    workers: Workers = 2,
    info: Annotated[bool, typer.Option("--info", help="Only describe the index PATH, with its recall.")] = False,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    engine: EngineOption = AUTO,
    as_json: Json = False,
) -> None:
    """Make a folder, JSONL, CSV or BEIR corpus searchable, or bring its index up to date.

    Only changes are embedded again, and of what is gone, only documents from PATH are removed. It may be stopped at any
    time: the same command resumes where it stopped. A JSONL line, or a CSV header, needs "id" and "text", may have
    a "title"; every other field can be filtered on in a search. The corpus may be larger than memory. From 100,000
    chunks on, an approximate index is built and its recall measured.

    An index may hold several sources. Exit code 1 means that documents were left out, as another source has their ids.

    \b
    Example:  search-r3 index ~/notes --into notes-index
    Next:     search-r3 search notes-index "your question"
    """
    silence_transformers()
    from search_r3.index.build.build_index import build_index
    from search_r3.index.readers.path_source import open_source, sample_queries
    from search_r3.index.search_index import SearchIndex
    from search_r3.model.resolve import default_model

    if info:
        show_info(SearchIndex.open(path), as_json)
        return
    if keep and prune:
        raise InputError("--keep and --prune contradict each other; give one of them")
    if ray is not None and backend is not None:
        raise InputError("--ray builds only indexes of the backend lance; leave --backend out")
    documents = open_source(path, delimiter=delimiter)
    documents.may_be_empty = prune
    target = into or f"{Path(path).resolve().stem}.index"
    check_target(target, documents, source, named=into is not None, backend=backend)
    given: dict[str, Any] = {
        "batch_size": batch_size,
        "batch_tokens": batch_tokens,
        "max_length": max_length,
        "prune": not keep,
        "source": source,
        "take_over": take_over,
        "may_prune": None if prune else ask_to_prune,
        "types": parse_type_options(types),
    }
    name = model or default_model()
    if ray is not None:
        loading = (device, dtype.value, engine)
        report = index_on_ray(target, documents, name, ray, workers, loading, **given)
    else:
        given |= {"commit_every": commit_every, "queries": sample_queries(documents), "backend": backend}
        report = build_index(target, documents, load(name, device, dtype, engine), **given)
    print_report(target, SearchIndex.open(target), report, as_json)
    report_what_was_left(target, report, as_json)


def print_report(target: str, made: SearchIndex, report: IndexReport, as_json: bool) -> None:
    """Print what a run did to the index `target`."""
    if as_json:
        print_json({"index": target, "model": made.info.model_name, **asdict(report)})
        return
    counts = ", ".join(f"{getattr(report, n):,} {n}" for n in ("added", "updated", "unchanged", "removed"))
    if report.truncated:
        chunks = "1 chunk is" if report.truncated == 1 else f"{report.truncated:,} chunks are"
        print(f"warning: {chunks} longer than the model reads; the end is found only by its words", file=sys.stderr)
    print(f"{target}: {report.documents:,} documents in {report.chunks:,} chunks: {counts}; {report.seconds:.1f} s")
    if report.full_text_rebuilt:
        print(FULL_TEXT_REBUILT)
    if report.duplicates_removed:
        print(DUPLICATES_REMOVED.format(report.duplicates_removed))
    if made.approximate:
        print(f"approximate index: {made.approximate}")
    mode = "" if "text" in made.backend.capabilities else " --mode vector"
    print(f'to search it: search-r3 search {shlex.quote(target)}{mode} "your question"')


def check_target(
    target: str, documents: PathSource, name: str | None, *, named: bool, backend: str | None = None
) -> None:
    """Refuse, before a model is loaded, a source or a backend that the index `target` cannot take.

    Raises:
        InputError: it has another backend; the source's name does not go together with those that the index has; or
            the user did not name the index (`named`), and there is one of the default name that has other sources.
    """
    from search_r3.index.backends.backend_registry import choose_backend
    from search_r3.index.backends.lance.lance_backend import LanceBackend
    from search_r3.index.index_sources import Sources, root_of
    from search_r3.index.storage.location import location_of

    location = location_of(target)
    kind = choose_backend(location, backend)
    if "streaming" not in kind.capabilities or (isinstance(location, Path) and not location.is_dir()):
        return
    sources = Sources.of(LanceBackend.open(location))
    scope = sources.scope(documents, name, target)
    if sources.records and not scope.known and not named:
        root = root_of(documents)
        other = f"{'-'.join(root.parts[-2:]).removeprefix('/').removeprefix('-')}.index"
        raise InputError(
            f'{target} is there already, with the source "{next(iter(sources.records))}": give --into {target} to add '
            f"to it, or another name, as in --into {shlex.quote(other)}"
        )


def parse_type_options(given: list[str] | None) -> dict[str, str]:
    """`--type` options as {field: type}.

    Raises:
        InputError: one is not of the form FIELD=TYPE.
    """
    types = {}
    for one in given or []:
        field, equals, kind = one.rpartition("=")
        if not equals or not field.strip():
            raise InputError(f"--type {one}: give FIELD=TYPE, as in --type year=text")
        types[field.strip()] = kind.strip()
    return types


def ask_to_prune(removal: Removal) -> bool:
    """Whether to remove what the source no longer has: a few always, many only if the user agrees on a terminal."""
    if not removal.large:
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    return typer.confirm(f"the source no longer has {removal}: remove them from the index?", err=True)


def report_what_was_left(index: str, report: IndexReport, as_json: bool) -> None:
    """Report on stderr what a run left out or kept in the index; ends the command where the user has to do something.

    Raises:
        InputError: documents were kept that the source no longer has (exit code 2).
        typer.Exit: another source has the ids of some documents (exit code 1).
    """
    from search_r3.index.index_sources import UNKNOWN
    from search_r3.index.readers.path_source import summarize_skipped

    quoted = shlex.quote(index)
    for line in summarize_skipped([*([] if as_json else report.skipped), *report.conflicts]):
        print(line, file=sys.stderr)
    warn_of_differing_rows(index, report.differing)
    if report.unknown:
        print(
            f"{report.unknown:,} documents of unknown source kept, which an earlier version indexed; to remove them: "
            f"search-r3 delete {quoted} --source {UNKNOWN}",
            file=sys.stderr,
        )
    if report.kept is not None:
        raise InputError(
            f"the source no longer has {report.kept}, too many to remove unasked: they were kept, all else is done; "
            "give --prune to remove them, or --keep to keep them"
        )
    if report.conflicts:
        raise typer.Exit(EXIT_CONFLICTS)
