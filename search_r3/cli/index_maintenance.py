"""`search-r3 delete` and `search-r3 compact`, and the description of an index by `search-r3 index --info`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search_r3.cli.options import Json, expand_home, print_json, silence_transformers
from search_r3.errors import InputError

if TYPE_CHECKING:
    from search_r3.index.backends.lance.duplicates import Differing
    from search_r3.index.search_index import SearchIndex

WORTH_A_LINE = 1_000_000
"""Bytes of old files that are worth a line of output."""
Index = Annotated[str, typer.Argument(callback=expand_home, help="An index's folder, made by `search-r3 index`.")]

FULL_TEXT = {
    "current": "every one is indexed (full text, BM25)",
    "outdated": "stop words and words of 40 bytes or more cannot be found, as an earlier version indexed them; "
    "the next `search-r3 index` or `search-r3 compact` rebuilds it",
    "none": "none are indexed: this backend searches by vectors only",
    "missing": "none can be found: the build was interrupted; run its `search-r3 index` command again",
}
DUPLICATES_REMOVED = "{:,} duplicates removed, each equal to a remaining row"
FULL_TEXT_REBUILT = "full text: rebuilt; all words can be found now, including stop words and words of 40 bytes or more"


def delete(
    index: Index,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID...]", help="Ids of documents, as search results show them.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Remove all documents of this source; `index --info` lists sources."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove documents from an index: by their ids, each with all of its chunks, or all documents of one source.

    If one of the ids does not exist, nothing is removed. `search-r3 compact` frees the space on disk.

    \b
    Example:  search-r3 delete notes-index 2023/plans.md drafts/old.md
              search-r3 delete notes-index --source ~/old-notes
    Next:     search-r3 compact notes-index
    """
    silence_transformers()
    from search_r3.index.maintenance import delete_documents, delete_source

    if bool(ids) == (source is not None):
        raise InputError("give the ids of documents, or --source with the name of a source (see index --info)")
    removed: dict[str, Any]
    if source is not None:
        done = delete_source(index, source)
        removed, line = {"source": done.source}, f"the source {done.source} removed"
    else:
        assert ids is not None
        done = delete_documents(index, ids)
        removed, line = {"documents": len(set(ids))}, f"{len(set(ids)):,} documents removed"
    if as_json:
        print_json({"index": index, **removed, "chunks": done.chunks, "full_text_rebuilt": done.full_text_rebuilt})
        return
    print(f"{index}: {line}, {done.chunks:,} chunks")
    if done.full_text_rebuilt:
        print(FULL_TEXT_REBUILT)


def compact(
    index: Index,
    now: Annotated[
        bool,
        typer.Option("--now", help="Free the space of old versions at once."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Merge an index's files, drop deleted rows, and add new rows to its search indices.

    Nothing is embedded, search results do not change, and searches continue during compaction. Indexing compacts parts
    of an index automatically; this command compacts all of it. Replaced files stay on disk for two minutes, as running
    searches may still read them: the next change or `compact` after that removes them, `--now` removes them at once.
    Servers and `search-r3 search` switch to the new version automatically; other programs that read the table with
    LanceDB must open it again if a file is not found.

    \b
    Example:  search-r3 compact notes-index --now
    Next:     search-r3 index --info notes-index
    """
    silence_transformers()
    from datetime import timedelta

    from search_r3.index.backends.lance.compaction import KEEP_VERSIONS
    from search_r3.index.maintenance import compact_index

    done = compact_index(index, keep=timedelta(0) if now else KEEP_VERSIONS)
    warn_of_differing_rows(index, done.differing)
    if as_json:
        print_json({"index": index, **asdict(done)})
        return
    print(f"{index}: {done.files_before:,} files of rows became {done.files_after:,}", end="")
    print(f", {done.bytes_before / 1e6:,.1f} MB became {done.bytes_after / 1e6:,.1f} MB" if done.bytes_after else "")
    if done.full_text_rebuilt:
        print(FULL_TEXT_REBUILT)
    if done.duplicates_removed:
        print(DUPLICATES_REMOVED.format(done.duplicates_removed))
    if not now and done.bytes_old > max(WORTH_A_LINE, done.bytes_after // 20):
        minutes = int(KEEP_VERSIONS.total_seconds() // 60)
        print(
            f"{done.bytes_old / 1e6:,.1f} MB of that are old files, kept for {minutes} minutes as searches may still "
            f"read them: the next change or compact after that removes them, `search-r3 compact {index} --now` at once"
        )


def show_info(opened: SearchIndex, as_json: bool) -> None:
    """Print the description of an index."""
    about: dict[str, Any] = opened.describe()
    if as_json:
        print_json(about)
        return
    state = "complete" if about["complete"] else "never finished: run its `search-r3 index` command again"
    approximate = opened.approximate
    columns = ", ".join(f"{name} ({kind})" for name, kind in about["columns"].items())
    print(f"{about['path']}: {about['documents']:,} documents in {about['chunks']:,} chunks, {state}")
    print(f"model:    {about['model_name']}, {about['dimension']} dimensions, contract {about['contract_hash'][:12]}")
    print(f"made:     {about['created']} by search-r3 {about['search_r3_version']}")
    if about["backend"] != "lance":
        print(f"backend:  {about['backend']}")
    print(f"vectors:  {approximate or 'every one is compared with the query (exact search)'}")
    print(f"words:    {FULL_TEXT[about['full_text']]}")
    if tuned := opened.backend.tuned_fusion:
        print(f"fusion:   {tuned} (search-r3 tune)")
    if columns:
        print(f"columns:  {columns}")
    if about["duplicate_ids"]:
        print(
            f"problem:  {about['duplicate_ids']:,} duplicate ids; the next `search-r3 index` or "
            f"`search-r3 compact {shlex.quote(about['path'])}` removes equal rows, and reports what to do about others"
        )
    for source in about["sources"]:
        where = f", read from {source['root']}" if source["root"] not in ("", source["name"]) else ""
        ids = f', ids begin with "{source["prefix"]}"' if source["prefix"] else ""
        unfinished = ", not all of it yet: its last run was interrupted" if source["unfinished"] else ""
        print(f"source:   {source['name']}: {source['documents']:,} documents{where}{ids}{unfinished}")


def warn_of_differing_rows(index: str, differing: Differing | None) -> None:
    """Report on stderr that rows with the same id differ, and how to remove the wrong ones."""
    if differing is None:
        return
    from search_r3.index.backends.lance.conversion import delete_command

    print(
        f"warning: {differing}; all were kept: index that source again (with --take-over if one id has rows of "
        f"several), or remove the document: {delete_command(differing.document, index)}",
        file=sys.stderr,
    )
