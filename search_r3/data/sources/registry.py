"""The kinds of source that a recipe can use: built-in ones and those of other packages (`search_r3.data_sources`).

A source first lists the files it will read, so that a build knows whether a cached part is still valid, and the
manifest can list the inputs.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from search_r3.data.beir import BeirDataset, beir_files, load_beir, read_reasoning
from search_r3.data.io.find_dataset import find_dataset
from search_r3.data.io.hf_datasets import local_files
from search_r3.data.io.input_stamps import below, described
from search_r3.data.pairs import TrainingPair
from search_r3.data.sources.beir_pairs import HOLD_OUT, cloze_pairs, query_pairs, title_pairs
from search_r3.data.sources.data_source import BuiltPairs, DataRoot, DataSource, Settings
from search_r3.data.sources.debian import debian_pairs, descriptions_file
from search_r3.data.sources.dictionaries import dictd_files, dictd_pairs, wordnet_files, wordnet_pairs
from search_r3.data.sources.docstrings import STDLIB, docstring_pairs, find_package, source_files
from search_r3.data.sources.generated_questions import question_pairs
from search_r3.data.sources.hf_pairs import hf_pairs
from search_r3.data.sources.manuals import man_files, man_pairs, pydoc_files, pydoc_pairs
from search_r3.data.sources.pair_files import own_pairs
from search_r3.data.sources.records import Records
from search_r3.errors import InputError
from search_r3.hints import refuse_unknown
from search_r3.plugins import Registry

PYTHON_LICENSE = "PSF-2.0"
COMMON: dict[str, type] = {"kind": str, "limit": int, "optional": bool, "damaged": str}
"""Keys of every source: the maximum number of pairs, whether it may be missing, and how to treat damaged input."""
RENAMED_KEYS = {"licence": "license", "any_licence": "any_license"}
"""Renamed keys of earlier versions, old -> new."""

# ----------------------------------------------------------------------------------------------------------- packages


def _docstrings(settings: Settings, seed: int, data_root: DataRoot) -> BuiltPairs:
    own = ("packages", "optional", "exclude", "damaged")
    options = {key: value for key, value in settings.items() if key not in own}
    packages, missing = _packages(settings)
    excluded = [
        document.text
        for name in settings.get("exclude", [])
        for document in load_beir(find_dataset(name, data_root)).corpus.values()
    ]
    records = Records(settings["damaged"])
    pairs, _ = docstring_pairs(list(packages), seed=seed, excluded=excluded, records=records, **options)
    origin: dict[str, Any] = {
        "packages_read": {
            package: _version_and_license(package) | described(below(folder, source_files(folder)))
            for package, folder in packages.items()
        }
    }
    if missing:
        origin["packages_missing"] = missing
    return records.built(pairs, origin)


def _check_shares(settings: Settings) -> None:
    documented, web, name = (settings.get(f"{key}_share", 0) for key in ("documented", "web", "name"))
    if not all(0 <= share <= 1 for share in (documented, web, name, web + name)):
        raise InputError("shares must be between 0 and 1, web_share and name_share together too")


def _packages(settings: Settings) -> tuple[dict[str, Path], list[str]]:
    """The folders of a source's packages, and the names of packages that are not installed."""
    found: dict[str, Path] = {}
    missing = []
    for package in settings.get("packages") or [STDLIB]:
        try:
            found[package] = find_package(package)
        except InputError:
            if not settings.get("optional"):
                raise
            missing.append(package)
    return found, missing


def _read_by_docstrings(settings: Settings, data_root: DataRoot) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for package, folder in _packages(settings)[0].items():
        files |= below(folder, source_files(folder), f"{package}/")
    for name in settings.get("exclude", []):
        files[f"{name}/corpus.jsonl"] = find_dataset(name, data_root) / "corpus.jsonl"
    return files


def _version_and_license(package: str) -> dict[str, Any]:
    if package == STDLIB:
        return {"version": platform.python_version(), "license": PYTHON_LICENSE}
    distributions = _distributions().get(package) or [package]
    try:
        metadata: Any = importlib.metadata.metadata(distributions[0])
    except importlib.metadata.PackageNotFoundError:
        return {"version": "unknown", "license": "unknown"}
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or [] if c.startswith("License")]
    declared = metadata.get("License-Expression") or "; ".join(classifiers) or (metadata.get("License") or "unknown")
    return {"version": metadata["Version"], "license": declared.splitlines()[0][:100]}


@cache
def _distributions() -> dict[str, list[str]]:
    """Package -> the distributions that provide it, sorted, since their order depends on the file system."""
    return {name: sorted(set(found)) for name, found in importlib.metadata.packages_distributions().items()}


# ---------------------------------------------------------------------------------------------------------- data sets


def _titles(settings: Settings, seed: int, data_root: DataRoot) -> BuiltPairs:
    dataset, records, origin = _dataset(settings, data_root)
    return _joined(title_pairs(dataset), records, origin)


def _cloze(settings: Settings, seed: int, data_root: DataRoot) -> BuiltPairs:
    dataset, records, origin = _dataset(settings, data_root)
    return _joined(cloze_pairs(dataset, per_document=settings.get("per_document", 1), seed=seed), records, origin)


def _questions(settings: Settings, seed: int, data_root: DataRoot) -> BuiltPairs:
    dataset, records, origin = _dataset(settings, data_root)
    return _joined(question_pairs(dataset, per_document=settings.get("per_document", 3), seed=seed), records, origin)


def _queries(settings: Settings, seed: int, data_root: DataRoot) -> BuiltPairs:
    split = settings["split"]
    if split == "test":
        raise InputError('the split "test" is for evaluation only; use another split for training')
    dataset, records, origin = _dataset(settings, data_root)
    options = {key: settings[key] for key in QUERY_OPTIONS if key in settings}
    if settings.get("reasoning"):
        path = find_dataset(settings["dataset"], data_root) / REASONING
        options["reasoning"] = read_reasoning(path, split, records.caught)
    return _joined(query_pairs(dataset, split=split, **options), records, origin)


def _check_queries(settings: Settings) -> None:
    refuse_unknown([settings.get("hold_out", HOLD_OUT[0])], HOLD_OUT, "hold_out", what="value")
    if "hold_out" in settings and "hold_out_modulus" not in settings:
        raise InputError('"hold_out" needs "hold_out_modulus"; add it, such as hold_out_modulus: 8')
    if "max_positives" in settings and not settings.get("graded"):
        raise InputError('"max_positives" needs "graded: true"; without it, every relevant document is a pair')


def _dataset(settings: Settings, data_root: DataRoot) -> tuple[BeirDataset, Records, dict[str, Any]]:
    folder = find_dataset(settings["dataset"], data_root)
    records = Records(settings["damaged"], folder)
    name = str(settings["dataset"])
    dataset = load_beir(folder, settings.get("split"), name=name, on_fault=records.caught)
    source = beir_files(folder, settings.get("split")).get("SOURCE.txt")
    if source is None:
        return dataset, records, {"license": "unknown: no SOURCE.txt next to the data"}
    lines = source.read_text(encoding="utf-8", errors="replace").splitlines()
    license = " ".join(line for line in lines if "licen" in line.lower() or "CC BY" in line)
    return dataset, records, {"license": license}


def _joined(made: tuple[list[TrainingPair], Counter[str]], records: Records, origin: dict[str, Any]) -> BuiltPairs:
    pairs, dropped = made
    records.dropped.update(dropped)
    return records.built(pairs, origin)


def _read_by_dataset(settings: Settings, data_root: DataRoot) -> dict[str, Path]:
    folder = find_dataset(settings["dataset"], data_root)
    files = beir_files(folder, settings.get("split"))
    return files | {REASONING: folder / REASONING} if settings.get("reasoning") else files


# -------------------------------------------------------------------------------------------------------------- files


def _files(
    read: Callable[..., BuiltPairs],
    files: Callable[..., list[Path]],
    keys: dict[str, type],
    needed: tuple[str, ...] = (),
) -> DataSource:
    """A source whose settings are the arguments of `read`; `files`, given `path`, lists what it reads."""

    def build(settings: Settings, seed: int, data_root: DataRoot) -> BuiltPairs:
        return read(**{key: value for key, value in settings.items() if key != "optional"})

    def reads(settings: Settings, data_root: DataRoot) -> dict[str, Path]:
        found = files(*([settings["path"]] if "path" in settings else []))
        return below(_common(found), found)

    return DataSource(build, reads, {"path": str} | keys, needed)


def _hf_pairs(settings: Settings, seed: int, data_root: DataRoot) -> BuiltPairs:
    return hf_pairs(**{key: value for key, value in settings.items() if key != "optional"})


def _read_by_hf_pairs(settings: Settings, data_root: DataRoot) -> dict[str, Path]:
    found = local_files(settings["path"])
    return below(_common(found), found) if found else {}


def _common(files: list[Path]) -> Path:
    """The deepest folder that contains all files."""
    folder = files[0].parent
    while not all(file.is_relative_to(folder) for file in files):
        folder = folder.parent
    return folder


DATASET: dict[str, type] = {"dataset": str}
CUT: dict[str, type] = {"max_chars": int}
QUERY_OPTIONS: dict[str, type] = {"hold_out_modulus": int, "hold_out": str, "graded": bool, "max_positives": int}
REASONING = "reasoning.jsonl"
"""People's reasoning for the queries of a data set."""
SOURCES: dict[str, DataSource] = {
    "docstrings": DataSource(
        _docstrings,
        _read_by_docstrings,
        {
            "packages": list,
            "exclude": list,
            "documented_share": float,
            "web_share": float,
            "name_share": float,
            "min_body_lines": int,
            "max_chars": int,
        },
        check=_check_shares,
    ),
    "titles": DataSource(_titles, _read_by_dataset, DATASET, ("dataset",)),
    "cloze": DataSource(_cloze, _read_by_dataset, DATASET | {"per_document": int}, ("dataset",)),
    "questions": DataSource(_questions, _read_by_dataset, DATASET | {"per_document": int}, ("dataset",)),
    "queries": DataSource(
        _queries,
        _read_by_dataset,
        DATASET | {"split": str} | QUERY_OPTIONS | {"reasoning": bool},
        ("dataset", "split"),
        check=_check_queries,
    ),
    "debian": _files(debian_pairs, lambda path=None: [descriptions_file(path)], CUT),
    "wordnet": _files(wordnet_pairs, wordnet_files, CUT | {"direction": str}),
    "dictd": _files(dictd_pairs, lambda path: list(dictd_files(path)), CUT | {"license": str}, ("path",)),
    "man": _files(man_pairs, man_files, CUT | {"any_license": bool}),
    "pydoc": _files(pydoc_pairs, pydoc_files, CUT | {"license": str}, ("path",)),
    "pairs": _files(
        own_pairs,
        lambda path: [Path(path)],
        {"query": str, "positive": str, "negatives": list, "header": bool, "delimiter": str}
        | {"name": str, "license": str},
        ("path", "license"),
    ),
    "datasets": DataSource(
        _hf_pairs,
        _read_by_hf_pairs,
        {"path": str, "split": str, "subset": str, "revision": str, "query": str, "positive": str, "negatives": list}
        | {"rows": int, "streaming": bool, "name": str, "license": str},
        ("path", "license"),
    ),
}


def _checked(name: str, source: Any) -> DataSource:
    plugin = f"the plugin {name!r} in search_r3.data_sources"
    if not isinstance(source, DataSource):
        raise InputError(f"{plugin} is a {type(source).__name__}; expected a DataSource")
    if shared := COMMON.keys() & source.keys.keys():
        raise InputError(f"{plugin} takes the key {min(shared)!r}, which every source has")
    return source


REGISTRY = Registry("source", "data_sources", SOURCES, _checked)
"""All kinds of source by name: ours and, after them, those of installed packages."""
