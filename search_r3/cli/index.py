"""`search-r3 index`: makes a corpus searchable or updates its index, and reports what it did."""

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
from search_r3.cli.index_watch import Watch
from search_r3.cli.options import (
    AUTO,
    Device,
    Dtype,
    EngineOption,
    Json,
    Model,
    expand_home,
    load,
    print_json,
    print_progress,
    silence_transformers,
)
from search_r3.errors import InputError
from search_r3.progress import on_terminal

if TYPE_CHECKING:
    from search_r3.index.build.build_report import IndexReport, Removal
    from search_r3.index.readers.path_source import PathSource
    from search_r3.index.search_index import SearchIndex
    from search_r3.model.searchr3 import SearchR3

FastDtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="auto is bfloat16 on a GPU and on CPUs with AMX or AVX-512 BF16, which are several times as fast in it, "
        "else float32."
    ),
]
EXIT_CONFLICTS = 1
"""Exit code of `index`: documents were left out because another source has their ids."""


def index(
    path: Annotated[
        str,
        typer.Argument(
            callback=expand_home,
            help="A folder of text, PDF, HTML, office, mail and other files, a BEIR folder, or a file; with --info, an "
            "index's folder.",
        ),
    ],
    into: Annotated[
        str | None,
        typer.Option(
            callback=expand_home,
            help="The index's folder, by default NAME.index here; or s3://BUCKET/NAME, or milvus://HOST:PORT/NAME.",
        ),
    ] = None,
    model: Model = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of tokens of a chunk with its title (512 by default).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of texts in one pass; by default only tokens are limited.")
    ] = None,
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens in one pass; lower it if memory runs out.")
    ] = 16384,
    commit_every: Annotated[
        int | None, typer.Option(min=1, help="Chunks per commit; by default those of ten seconds, from 256 to 8,192.")
    ] = None,
    delimiter: Annotated[
        str | None,
        typer.Option(
            help="The delimiter of a CSV file, if it is not detected correctly: a character, tab or semicolon."
        ),
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--field",
            metavar="NAME=FIELD",
            help="Which field or column of the records is the id, text or title, if it has another name: "
            "text=comment. Repeatable.",
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Read only such files of the folder, by a pattern as in .gitignore: '*.pdf', 'docs/'. Repeatable.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Leave out such files and folders, as .gitignore files in the folder do. Repeatable.",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The source's name, independent of its location; by default the absolute path of PATH. A run "
            "replaces and removes only documents of this source.",
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the documents that PATH no longer has.")] = False,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Remove all documents that PATH no longer has; without it, more than a tenth of the source is "
            "removed only if you confirm on a terminal.",
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
            help="How a new index is stored: lance (the default), numpy (one file, vectors only), or a backend of "
            "another package. An index keeps its backend.",
        ),
    ] = None,
    exchange: Annotated[
        bool,
        typer.Option(
            "--exchange",
            help="Build a new index beside the one in Milvus; it takes its place in one step when it is done.",
        ),
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Then stay, and bring the index up to date whenever a file changes.")
    ] = False,
    ray: Ray = None,
    workers: Workers = 2,
    info: Annotated[bool, typer.Option("--info", help="Only describe the index PATH, with its recall.")] = False,
    device: Device = None,
    dtype: FastDtypeOption = Dtype.auto,
    engine: EngineOption = AUTO,
    as_json: Json = False,
) -> None:
    """Make a folder, JSONL, CSV, Parquet or BEIR corpus searchable, or bring its index up to date.

    Only changed documents are embedded again, and documents that are gone from PATH are removed. You can stop it at any
    time; the same command resumes where it stopped. JSONL lines and CSV files need the fields "id" and "text" and may
    have a "title", or other fields that --field names; searches can filter on all other fields. The corpus may be
    larger than memory. From 100,000 chunks on, an approximate index is built and its recall is measured.

    An index may have several sources. Exit code 1 means that documents were left out because another source has their
    ids.

    \b
    Example:  search-r3 index ~/notes --into notes-index
    Next:     search-r3 search notes-index "your question"
    """
    silence_transformers()
    if info:
        from search_r3.index.search_index import SearchIndex

        show_info(SearchIndex.open(path), as_json)
        return
    if keep and prune:
        raise InputError("--keep and --prune contradict each other; give one of them")
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "batch_tokens": batch_tokens,
        "max_length": max_length,
        "prune": not keep,
        "source": source,
        "take_over": take_over,
        "may_prune": None if prune else ask_to_prune,
        "types": parse_type_options(types),
    }
    update_index(
        path,
        into,
        model,
        options,
        loading=(device, dtype, engine),
        reading={
            "delimiter": delimiter,
            "include": include or (),
            "exclude": exclude or (),
            "fields": parse_field_options(fields),
        },
        backend=backend,
        exchange=exchange,
        commit_every=commit_every,
        cluster=None if ray is None else (ray, workers),
        watch=watch,
        as_json=as_json,
    )


def update_index(
    path: str,
    into: str | None,
    model: str | None,
    options: dict[str, Any],
    *,
    loading: tuple[str | None, Dtype, str],
    reading: dict[str, Any],
    backend: str | None,
    exchange: bool,
    commit_every: int | None,
    cluster: tuple[str, int] | None,
    watch: bool,
    as_json: bool,
) -> None:
    """Index `path`, here or on a Ray cluster, and print what was done; if `watch`, until it is stopped.

    Args:
        options: options that local and distributed builds take.
        reading: options of `open_source`.
        loading: the model's device, dtype and engine.
        cluster: address of a Ray cluster, and number of workers.

    Raises:
        InputError: the source or the index cannot be used as requested, or documents were kept (see
            `report_what_was_left`).
        typer.Exit: documents were left out.
    """
    from search_r3.index.readers.path_source import open_source, sample_queries

    if cluster is not None and (backend is not None or exchange):
        raise InputError("--ray builds only indexes of the backend lance; leave --backend and --exchange out")
    if cluster is not None and watch:
        raise InputError("--watch keeps the model loaded here, --ray on other machines; give one of them")
    if watch and exchange:
        raise InputError("--exchange builds a new index once, --watch keeps one up to date; give one of them")
    documents = open_source(path, **reading)
    if on_terminal():
        print_progress(f"indexing {path}: loading the model ...")  # before the imports, which take seconds
    from search_r3.index.build.build_index import build_index
    from search_r3.index.search_index import SearchIndex
    from search_r3.model.resolve import default_model
    from search_r3.model.text_limit import check_room

    documents.may_be_empty = options["prune"] and options["may_prune"] is None
    target = into or f"{Path(path).resolve().stem}.index"
    check_target(target, documents, options["source"], named=into is not None, backend=backend)
    name = model or default_model()
    device, dtype, engine = loading
    # The watch begins before the model is loaded, so that no change is missed.
    watching = Watch(target, documents, options, backend, as_json) if watch else None
    if cluster is not None:
        report = index_on_ray(target, documents, name, *cluster, (device, dtype.value, engine), **options)
    else:
        loaded = load_fast(name, device, dtype, engine)
        local: dict[str, Any] = {
            "commit_every": commit_every,
            "progress": print_progress,
            "queries": sample_queries(documents),
            "backend": backend,
            "exchange": exchange,
        }
        if options["max_length"] is not None:
            check_room(loaded, options["max_length"], name="--max-length")
        report = build_index(target, documents, loaded, **options, **local)
    print_report(target, SearchIndex.open(target), report, as_json)
    try:
        report_what_was_left(target, report, as_json)
    except (InputError, typer.Exit) as error:
        if watching is None:
            raise
        if isinstance(error, InputError):
            print_progress(f"error: {error}")
    if watching is not None:
        watching.run(loaded)


def load_fast(name: str, device: str | None, dtype: Dtype, engine: str) -> SearchR3:
    """Load a model to embed documents: "auto" is the dtype in which this machine is fastest."""
    if dtype is Dtype.auto and engine in (AUTO, "torch"):
        from search_r3.model.processor import fastest_dtype

        dtype = Dtype(fastest_dtype(device))
    return load(name, device, dtype, engine)


def print_report(target: str, made: SearchIndex, report: IndexReport, as_json: bool) -> None:
    """Print what a run changed in the index `target`."""
    if as_json:
        print_json({"index": target, "model": made.info.model_name, **asdict(report)})
        return
    counts = ", ".join(f"{getattr(report, n):,} {n}" for n in ("added", "updated", "unchanged", "removed"))
    if report.truncated:
        chunks = "1 chunk is" if report.truncated == 1 else f"{report.truncated:,} chunks are"
        print(f"warning: {chunks} too long for the model, so their ends can be found only by words", file=sys.stderr)
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
    """Refuse a source or a backend that the index `target` cannot use, before a model is loaded.

    Raises:
        InputError: the index has another backend; the source's name conflicts with those in the index; or the user did
            not name the index (`named`), and the index with the default name has other sources.
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
            f'{target} already exists, with the source "{next(iter(sources.records))}": give --into {target} to add '
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


def parse_field_options(given: list[str] | None) -> dict[str, str]:
    """`--field` options as {"id", "text" or "title": field}.

    Raises:
        InputError: one is not of the form NAME=FIELD, or two are for the same name.
    """
    fields: dict[str, str] = {}
    for one in given or []:
        name, equals, field = one.partition("=")
        if not equals or not field.strip():
            raise InputError(f"--field {one}: give NAME=FIELD, as in --field text=comment")
        if name.strip() in fields:
            raise InputError(f'--field {one}: "{name.strip()}" was already given; give each once')
        fields[name.strip()] = field.strip()
    return fields


def ask_to_prune(removal: Removal) -> bool:
    """Whether to remove documents that the source no longer has: many only if the user agrees on a terminal."""
    if not removal.large:
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    return typer.confirm(f"the source no longer has {removal}: remove them from the index?", err=True)


def report_what_was_left(index: str, report: IndexReport, as_json: bool) -> None:
    """Report on stderr what a run left out or kept in the index, and end the command if the user has to act.

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
            f"{report.unknown:,} documents of unknown source, indexed by an earlier version, were kept; to remove "
            f"them: search-r3 delete {quoted} --source {UNKNOWN}",
            file=sys.stderr,
        )
    if report.kept is not None:
        raise InputError(
            f"the source no longer has {report.kept}, too many to remove without confirmation: they were kept, "
            "and everything else is done; give --prune to remove them, or --keep to keep them"
        )
    if report.conflicts:
        raise typer.Exit(EXIT_CONFLICTS)
