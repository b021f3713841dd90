"""Finding a data set by name: a BEIR folder below the data root, or one that is downloaded there on first use.

It builds on `beir`, which reads such folders, and `remote_datasets`, which downloads them.
"""

from __future__ import annotations

from pathlib import Path

from search_r3.data.beir import DATA_VARIABLE, resolve_root
from search_r3.data.io.remote_datasets import fetch, is_remote
from search_r3.errors import InputError
from search_r3.hints import nearest


def available_datasets(root: str | Path | None = None) -> list[str]:
    """Names of the BEIR folders below the data root, one or two levels down ("scifact", "mkqa/en"), sorted."""
    base = resolve_root(root)
    found = [*base.glob("*/corpus.jsonl"), *base.glob("*/*/corpus.jsonl")]
    return sorted(path.parent.relative_to(base).as_posix() for path in found)


def find_dataset(name: str | Path, data_root: str | Path | None = None) -> Path:
    """The folder of a data set: an existing path as given, else `name` below the data root; "ir_datasets:NAME",
    "mteb:TASK", "hf:OWNER/NAME" and "nanobeir:NAME" are downloaded there on first use (see `remote_datasets`).

    Raises:
        InputError: there is no data set of that name; the message lists the available ones and suggests the nearest,
            unless it can only be a path.
    """
    if is_remote(name):
        return fetch(str(name), data_root)
    base = resolve_root(data_root)
    below = base / name
    if not (Path(name) / "corpus.jsonl").is_file() and (below / "corpus.jsonl").is_file():
        return below
    if Path(name).exists():
        return Path(name)
    if Path(name).is_absolute() or Path(name).suffix == ".jsonl":
        raise InputError(f"{name} does not exist; check the path")
    names = available_datasets(base)
    if not names:
        raise InputError(
            f'no data set "{name}": {base} contains no BEIR folder; point --data or {DATA_VARIABLE} at the folder of '
            "your data sets, or give a data set's own path"
        )
    near = nearest(name, names, cutoff=0.4)
    hint = f'did you mean "{near}"? ' if near else ""
    raise InputError(f'no data set "{name}" in {base}; {hint}there are: {", ".join(names)}')
