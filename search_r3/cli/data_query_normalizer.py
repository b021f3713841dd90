"""The command `data query-normalizer`, which learns from documents how words are spelled, for typos and lower case."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search_r3.cli.options import DataRoot, Json, print_json
from search_r3.errors import InputError


def data_query_normalizer(
    output: Annotated[Path, typer.Argument(help="The JSON file to write.")],
    corpus: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CORPUS]...", help="Data sets, names or BEIR folders, whose documents are read."),
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(readable=False, help="Training pairs, whose positives teach spelling as well.")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="A kind of source of the pairs that teaches capitals: debian. Repeatable."),
    ] = None,
    wordnet: Annotated[
        bool, typer.Option("--wordnet", help="Add the names in WordNet (Debian: wordnet-base).")
    ] = False,
    word_list: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A text file of words that are no typos, one a line, each with its frequency behind it if known. "
            "Repeatable.",
        ),
    ] = None,
    extend: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Add the word lists to this query normalizer, or a checkpoint's, in place of documents.",
        ),
    ] = None,
    data: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Learn words from documents, so that "who was genhgis khan" is embedded as "Who was Genghis Khan" is.

    A word that no document has is taken for a typo of a frequent one, if one slip of a finger is between them; a query
    typed in one case gets the usual case of its words. Queries of the data sets are not read. An adapter gets the file
    by `query_normalizer` in a recipe of stage 1, or by --query-normalizer of train average; documents stay as they are.

    \b
    Example:  search-r3 data query-normalizer words.json hotpotqa scifact --wordnet
              search-r3 data query-normalizer more.json --extend words.json --word-list names.txt
    Next:     search-r3 train average ADAPTER --query-normalizer words.json --into FOLDER
    """
    from search_r3.data.normalizer_sources import extend_query_normalizer, learn_query_normalizer
    from search_r3.model.query_normalizer import QueryNormalizer

    check_output(output)
    if extend is not None:
        if corpus or pairs or kind or wordnet:
            raise InputError("--extend takes word lists alone (--word-list); leave out what documents are read from")
        if not word_list:
            raise InputError("--extend needs at least one --word-list")
        made = extend_query_normalizer(QueryNormalizer.load(extend), word_list)
    elif corpus:
        made = learn_query_normalizer(
            corpus, pairs=pairs, kinds=kind or (), wordnet=wordnet, word_lists=word_list or (), data_root=data
        )
    else:
        raise InputError("name at least one CORPUS, or a query normalizer to --extend")
    made.save(output)
    cases, spelling = made.truecaser, made.spelling
    counts = {
        "capitalized": len(cases.words),
        "in_context": len(cases.after) + len(cases.before),
        "known": len(spelling.rank) + len(spelling.known),
        "corrections": len(spelling.rank),
        "sha256": made.hash,
    }
    if as_json:
        print_json({"output": str(output), "sources": list(made.sources)} | counts)
        return
    print(
        f"{output}: {counts['capitalized']:,} words with capitals, {counts['in_context']:,} more beside another word; "
        f"{counts['known']:,} words that are no typos, {counts['corrections']:,} of them frequent enough to correct one"
    )


def check_output(output: Path) -> None:
    """Raise InputError, before anything is learned, if the file would replace anything but another query normalizer, or
    be taken for that of a checkpoint, whose contract names another one or none."""
    from search_r3.model.checkpoint import CONTRACT_FILE
    from search_r3.model.query_normalizer import QUERY_NORMALIZER_FILE, QueryNormalizer

    if output.is_dir():
        raise InputError(f"{output} is a folder; name a file, such as {output / 'words.json'}")
    exists = output.exists()
    if (exists or output.name == QUERY_NORMALIZER_FILE) and (output.parent / CONTRACT_FILE).exists():
        raise InputError(
            f"{output} belongs to a checkpoint, whose contract names its query normalizer, if it has one; write a file "
            "elsewhere, and give it to search-r3 train average"
        )
    if not exists:
        return
    try:
        QueryNormalizer.load(output)
    except InputError as error:
        raise InputError(f"{output} exists and is no query normalizer, so it is not replaced; name another") from error
