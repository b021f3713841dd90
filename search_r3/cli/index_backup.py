"""`search-r3 backup` and `search-r3 restore`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from search_r3.cli.index_maintenance import Index
from search_r3.cli.options import Json, expand_home, print_json, silence_transformers

if TYPE_CHECKING:
    from search_r3.index.backup import IndexCopy


def backup(
    index: Index,
    target: Annotated[
        str,
        typer.Argument(callback=expand_home, help="A new folder, or a name on object storage (s3://bucket/name)."),
    ],
    as_json: Json = False,
) -> None:
    """Copy an index as its last commit left it, while others search it and write to it.

    The copy is an index itself: it can be searched, served, and copied back by `restore`. It is opened and read before
    the command ends. Nothing has to be stopped; a folder is complete or not there.

    \b
    Example:  search-r3 backup notes-index /backup/notes-2026-11-29
              search-r3 backup notes-index s3://bucket/backups/notes-2026-11-29
    Next:     search-r3 restore /backup/notes-2026-11-29 notes-index
    """
    silence_transformers()
    from search_r3.index.backup import backup_index

    _report(backup_index(index, target), as_json)


def restore(
    copied: Annotated[
        str,
        typer.Argument(metavar="BACKUP", callback=expand_home, help="What `search-r3 backup` made."),
    ],
    index: Annotated[
        str, typer.Argument(callback=expand_home, help="Where the index is to be: a folder, or a name as above.")
    ],
    replace: Annotated[
        bool, typer.Option("--replace", help="Exchange the index that is in the folder, in one step.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy a backup to where an index is to be, and read it there.

    With --replace, running servers turn to the restored index within a second, and no search fails.

    \b
    Example:  search-r3 restore s3://bucket/backups/notes-2026-11-29 notes-index
    Next:     search-r3 index --info notes-index
    """
    silence_transformers()
    from search_r3.index.backup import restore_index

    _report(restore_index(copied, index, replace=replace), as_json)


def _report(done: IndexCopy, as_json: bool) -> None:
    if not done.complete:
        print(
            "warning: a build was running or was interrupted: the copy has what it had committed, and the same "
            "`search-r3 index` command on it adds the rest",
            file=sys.stderr,
        )
    if as_json:
        print_json(asdict(done))
    else:
        print(f"{done.source} -> {done.target}: {done.chunks:,} chunks, {done.bytes / 1e6:,.1f} MB")
