"""The commands that look after an index: what it is, documents removed by their ids, files put together."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search_r3.cli.options import Json, hush, print_json

if TYPE_CHECKING:
    from search_r3.index.table import SearchIndex

Index = Annotated[str, typer.Argument(help="An index's folder, made by `search-r3 index`.")]

FULL_TEXT = {
    "current": "every one is indexed (full text, BM25)",
    "outdated": "stop words and words of 40 bytes or more cannot be found, as an earlier version indexed them; "
    "the next `search-r3 index` or `search-r3 compact` rebuilds it",
    "missing": "none can be found: the build was interrupted; run its `search-r3 index` command again",
}
FULL_TEXT_REBUILT = "full text: rebuilt; every word can be found now, also stop words and words of 40 bytes or more"


def delete(
    index: Index,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of documents, as the search shows them.")],
    as_json: Json = False,
) -> None:
    """Remove documents from an index by their ids, each with all of its chunks.

    If one of the ids is not there, nothing is removed. The space on disk comes back with `search-r3 compact`.

    \b
    Example:  search-r3 delete notes-index 2023/plans.md drafts/old.md
    Next:     search-r3 compact notes-index
    """
    hush()
    from search_r3.index.maintenance import delete_documents

    chunks = delete_documents(index, ids)
    if as_json:
        print_json({"index": index, "documents": len(set(ids)), "chunks": chunks})
    else:
        print(f"{index}: {len(set(ids)):,} documents removed, {chunks:,} chunks")


def compact(index: Index, as_json: Json = False) -> None:
    """Put an index's files together, drop what was deleted, and fold new rows into its indices.

    Nothing is embedded and nothing that a search finds changes; it may be done while others search. `search-r3 index`
    does the same at its end. Versions of the last hour are kept for those who read them, so their space comes back
    with the next time.

    \b
    Example:  search-r3 compact notes-index
    Next:     search-r3 index --info notes-index
    """
    hush()
    from search_r3.index.maintenance import compact_index

    done = compact_index(index)
    if as_json:
        print_json({"index": index, **vars(done)})
    else:
        print(f"{index}: {done.files_before:,} files of rows became {done.files_after:,}", end="")
        print(
            f", {done.bytes_before / 1e6:,.1f} MB became {done.bytes_after / 1e6:,.1f} MB" if done.bytes_after else ""
        )
        if done.full_text_rebuilt:
            print(FULL_TEXT_REBUILT)
        if done.healed:
            print(f"{done.healed:,} rows removed whose id stood more than once; the newest of each is kept")


def show_info(opened: SearchIndex, as_json: bool) -> None:
    """Print what an index is."""
    about: dict[str, Any] = opened.describe()
    if as_json:
        print_json(about)
        return
    whole = "complete" if about["complete"] else "never finished: run its `search-r3 index` command again"
    approximate = opened.approximate
    columns = ", ".join(f"{name} ({kind})" for name, kind in about["columns"].items())
    print(f"{about['path']}: {about['documents']:,} documents in {about['chunks']:,} chunks, {whole}")
    print(f"model:    {about['model_name']}, {about['dimension']} dimensions, contract {about['contract_hash'][:12]}")
    print(f"made:     {about['created']} by search-r3 {about['search_r3_version']}")
    print(f"vectors:  {approximate or 'every one is compared with the query (exact search)'}")
    print(f"words:    {FULL_TEXT[about['full_text']]}")
    print(f"columns:  {columns}")
    if about["doubled"]:
        print(
            f"doubled:  {about['doubled']:,} ids stand more than once; the next `search-r3 index` or "
            f"`search-r3 compact {shlex.quote(about['path'])}` keeps the newest row of each"
        )
