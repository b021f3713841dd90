"""Tables read by Hugging Face's library `datasets`: a data set of the hub, or local Parquet or JSON Lines files.

Local files are streamed, so that no copy of them is kept; data sets of the hub are kept in `HF_HOME`, unless they are
streamed. Only the rows that are asked for are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from search_r3.data.io.line_reader import MissingSource
from search_r3.errors import InputError, first_line
from search_r3.optional import require

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json"}
"""Suffix of a local file -> the name that `datasets` has for its format."""
PACKED = (".gz", ".bz2", ".xz", ".zst")
Rows = Iterable[dict[str, Any]]


def local_files(path: str | Path) -> list[Path]:
    """The files of a local path, sorted: the file itself, or those of a folder that `datasets` can read; [] for a name
    of the hub.

    Raises:
        InputError: it is a file of another format, or a folder without such files.
    """
    given = Path(path)
    if given.is_file():
        _builder([given])
        return [given]
    if not given.is_dir():
        return []
    found = sorted(file for file in given.rglob("*") if file.is_file() and _suffix(file) in BUILDERS)
    if not found:
        raise InputError(f"{path} has no file that ends in {', '.join(BUILDERS)}; give another folder")
    return found


def open_splits(
    path: str | Path,
    subset: str | None = None,
    *,
    revision: str | None = None,
    streaming: bool = True,
    files: dict[str, list[Path]] | None = None,
    purpose: str = "a Hugging Face data set",
) -> dict[str, Rows]:
    """Split -> its rows, which are read when they are iterated over.

    Args:
        path: a data set of the hub ("owner/name"), a local file, whose only split is "train", or a local folder.
        subset: the subset (configuration) of the data set; None is its only one.
        revision: commit, branch or tag of a data set of the hub.
        streaming: read a data set of the hub without keeping a copy of it.
        files: split -> local files to read instead of those of `path`.
        purpose: what needs the package `datasets`, for the message if it is missing.

    Raises:
        MissingSource: there is no such data set, subset or file, or no network.
        InputError: the package is not installed, or the data cannot be read.
    """
    datasets = require("datasets", "datasets", purpose)
    local = local_files(path)
    if files is None and Path(path).is_file():
        files = {"train": local}
    with _told(str(path)), _quiet(datasets):
        if files is not None:
            opened = {split: _open_files(datasets, listed) for split, listed in files.items()}
        else:
            opened = datasets.load_dataset(str(path), subset, revision=revision, streaming=streaming or bool(local))
    return {str(split): _Table(rows, str(path), datasets) for split, rows in opened.items()}


def subsets(path: str | Path, revision: str | None = None, purpose: str = "a Hugging Face data set") -> list[str]:
    """The subsets (configurations) of a data set of the hub or of a local folder. Raises as `open_splits`."""
    datasets = require("datasets", "datasets", purpose)
    with _told(str(path)), _quiet(datasets):
        return list(datasets.get_dataset_config_names(str(path), revision=revision))


def commit_of(path: str, revision: str | None) -> str:
    """The commit that a data set of the hub is read at; "unknown" if the hub does not answer."""
    try:
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(path, revision=revision).sha)
    except Exception:
        return "unknown"


class _Table:
    """Rows whose reading errors are ours."""

    def __init__(self, rows: Any, path: str, datasets: Any) -> None:
        self._rows, self._path, self._datasets = rows, path, datasets

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with _told(self._path), _quiet(self._datasets):
            yield from self._rows


def _open_files(datasets: Any, files: list[Path]) -> Any:
    names = {"all": [str(file) for file in files]}
    return datasets.load_dataset(_builder(files), data_files=names, split="all", streaming=True)


@contextmanager
def _told(path: str) -> Iterator[None]:
    try:
        yield
    except (InputError, GeneratorExit):
        raise
    except (FileNotFoundError, ConnectionError) as error:  # those of `datasets` for an unknown data set too
        raise MissingSource(f"{path} cannot be read as a data set: {first_line(error)}") from error
    except Exception as error:
        raise InputError(f"{path} cannot be read as a data set: {first_line(error)}") from error


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without the progress bars of `datasets`."""
    shown = datasets.utils.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _suffix(file: Path) -> str:
    return (Path(file.stem).suffix if file.suffix in PACKED else file.suffix).lower()


def _builder(files: list[Path]) -> str:
    kinds = {BUILDERS.get(_suffix(file)) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise InputError(f"{files[0]}: expected files of one kind, ending in {', '.join(BUILDERS)}")
    return str(kinds.pop())
