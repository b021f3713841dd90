"""The command `data truecaser`, which learns the usual case of words for queries typed in one case."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search_r3.cli.options import DataRoot, Json, print_json


def data_truecaser(
    output: Annotated[Path, typer.Argument(help="The JSON file to write.")],
    corpus: Annotated[
        list[str],
        typer.Argument(metavar="CORPUS...", help="Data sets, names or BEIR folders, whose documents are read."),
    ],
    pairs: Annotated[
        Path | None, typer.Option(readable=False, help="Training pairs, whose positives are read as well; see --kind.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="A kind of source of the pairs that are read: debian. Repeatable.")
    ] = None,
    wordnet: Annotated[
        bool, typer.Option("--wordnet", help="Add the names in WordNet (Debian: wordnet-base).")
    ] = False,
    data: DataRoot = None,
    as_json: Json = False,
) -> None:
    """Learn from documents which words have capitals, so that "who was genghis khan" is embedded as "Genghis Khan" is.

    Queries of the data sets are not read. An adapter gets the file by `truecaser` in a recipe of stage 1, or by
    --truecaser of train average; it changes only queries that are typed in one case, and no document.

    \b
    Example:  search-r3 data truecaser truecaser.json hotpotqa scifact --wordnet
    Next:     search-r3 train average ADAPTER --truecaser truecaser.json --into FOLDER
    """
    from search_r3.data.case_sources import learn_truecaser

    made = learn_truecaser(corpus, pairs=pairs, kinds=kind or (), wordnet=wordnet, data_root=data)
    made.save(output)
    counts = {"words": len(made.words), "pairs": len(made.after) + len(made.before), "sha256": made.hash}
    if as_json:
        print_json({"output": str(output), "sources": made.sources} | counts)
        return
    print(f"{output}: {counts['words']:,} words and {counts['pairs']:,} pairs of words with a case of their own")
