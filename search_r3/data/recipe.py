"""A YAML recipe into one file of training pairs: `search-r3 data build RECIPE`.

The same recipe, seed and package versions give the same bytes; the manifest beside the output says what went in, what
was dropped and why, under which licences, and the output's SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from search_r3.data import clean
from search_r3.data.beir import find_dataset, load_beir, refuse_unknown, stable_order
from search_r3.data.debian import debian_pairs
from search_r3.data.dictionaries import dictd_pairs, wordnet_pairs
from search_r3.data.docstrings import STDLIB, docstring_pairs, find_package
from search_r3.data.manuals import man_pairs, pydoc_pairs
from search_r3.data.pairs import TrainingPair, write_pairs
from search_r3.data.sources import Built, MissingSource
from search_r3.data.titles import cloze_pairs, query_pairs, title_pairs
from search_r3.errors import InputError
from search_r3.files import atomic_write_text

PYTHON_LICENCE = "PSF-2.0"


Builder = Callable[[dict[str, Any], int, "str | Path | None"], Built]


def build_pairs(
    recipe_path: str | Path, output: str | Path, data_root: str | Path | None = None, seed: int | None = None
) -> dict[str, Any]:
    """Build the pairs of a recipe, shuffle them, write OUTPUT (JSONL) and OUTPUT.manifest.json.

    Args:
        recipe_path: a YAML file with `sources`, a list (see `configs/data/first.yaml`), and optionally `seed`,
            `decontaminate` and `deduplicate` (see `clean.DecontaminateSettings` and `clean.DeduplicateSettings`).
        output: the JSONL file to write.
        data_root: where data sets named in the recipe are (see `find_dataset`).
        seed: instead of the recipe's; 0 where neither gives one.

    Returns:
        The manifest.

    Raises:
        InputError: the recipe is no valid one (the source's number and key are named), a package or data set is
            missing, a source gives no pair at all, or the output cannot be written.
    """
    recipe = _read_recipe(Path(recipe_path))
    seed = recipe.get("seed", 0) if seed is None else seed
    pairs: dict[tuple[str, str], TrainingPair] = {}
    ids: set[str] = set()
    reports = []
    for number, source in enumerate(recipe["sources"], start=1):
        where = f"{recipe_path}, source {number} ({source['kind']})"
        build, _ = KINDS[source["kind"]]
        settings = {key: value for key, value in source.items() if key not in ("kind", "limit")}
        try:
            built = build(settings, seed, data_root)
        except MissingSource as error:
            if not source.get("optional"):
                raise InputError(f'{where}: {error}; or mark the source "optional: true"') from error
            built = Built([], Counter(), {"missing": str(error)})
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        chosen = built.pairs
        if "limit" in source and len(chosen) > source["limit"]:
            kept = set(stable_order((pair.id for pair in chosen), seed)[: source["limit"]])
            built.dropped["over the limit"] += len(chosen) - len(kept)
            chosen = [pair for pair in chosen if pair.id in kept]
        before = len(pairs)
        for pair in chosen:
            if (pair.query, pair.positive) in pairs or pair.id in ids:
                built.dropped["already given by another source"] += 1
            else:
                pairs[pair.query, pair.positive] = pair
                ids.add(pair.id)
        if len(pairs) == before and not source.get("optional"):
            raise InputError(f"{where}: it gives no pair ({dict(built.dropped)}); loosen its settings or remove it")
        counts = Counter(pair.source for pair in list(pairs.values())[before:])
        reports.append(
            {
                **source,
                "count": len(pairs) - before,
                "by_source": dict(sorted(counts.items())),
                "dropped": dict(sorted(built.dropped.items())),
                **built.origin,
            }
        )
    cleaned, cleaning = clean.clean_pairs(list(pairs.values()), recipe, str(recipe_path), data_root)
    by_id = {pair.id: pair for pair in cleaned}
    write_pairs(output, (by_id[name] for name in stable_order(by_id, seed)))
    manifest = {
        "output": Path(output).name,
        "sha256": hashlib.sha256(Path(output).read_bytes()).hexdigest(),
        "count": len(by_id),
        "seed": seed,
        "python": platform.python_version(),
        "sources": reports,
        "recipe": recipe,
    }
    if cleaning is not None:
        manifest["cleaning"] = cleaning
    atomic_write_text(f"{output}.manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


# ---------------------------------------------------------------------------------------------------- kinds of source


def _docstrings(settings: dict[str, Any], seed: int, data_root: str | Path | None) -> Built:
    options = {key: value for key, value in settings.items() if key not in ("packages", "optional", "exclude")}
    packages, missing = [], []
    for package in settings.get("packages") or [STDLIB]:
        try:
            find_package(package)
            packages.append(package)
        except InputError:
            if not settings.get("optional"):
                raise
            missing.append(package)
    excluded = [
        document.text
        for name in settings.get("exclude", [])
        for document in load_beir(find_dataset(name, data_root)).corpus.values()
    ]
    pairs, dropped = docstring_pairs(packages, seed=seed, excluded=excluded, **options)
    origin: dict[str, Any] = {"packages_read": {package: _version_and_licence(package) for package in packages}}
    if missing:
        origin["packages_missing"] = missing
    return Built(pairs, dropped, origin)


def _titles(settings: dict[str, Any], seed: int, data_root: str | Path | None) -> Built:
    folder = find_dataset(settings["dataset"], data_root)
    return Built(*title_pairs(load_beir(folder, name=str(settings["dataset"]))), _dataset_origin(folder))


def _cloze(settings: dict[str, Any], seed: int, data_root: str | Path | None) -> Built:
    folder = find_dataset(settings["dataset"], data_root)
    dataset = load_beir(folder, name=str(settings["dataset"]))
    per_document = settings.get("per_document", 1)
    return Built(*cloze_pairs(dataset, per_document=per_document, seed=seed), _dataset_origin(folder))


def _queries(settings: dict[str, Any], seed: int, data_root: str | Path | None) -> Built:
    split = settings["split"]
    if split == "test":
        raise InputError('the split "test" is for measuring, never for training; name another')
    folder = find_dataset(settings["dataset"], data_root)
    dataset = load_beir(folder, split, name=str(settings["dataset"]))
    pairs, dropped = query_pairs(dataset, split=split, hold_out_modulus=settings.get("hold_out_modulus"))
    return Built(pairs, dropped, _dataset_origin(folder))


def _files(read: Callable[..., Built]) -> Builder:
    """A kind of source whose settings are the arguments of `read`."""

    def build(settings: dict[str, Any], seed: int, data_root: str | Path | None) -> Built:
        return read(**{key: value for key, value in settings.items() if key != "optional"})

    return build


def _version_and_licence(package: str) -> dict[str, str]:
    if package == STDLIB:
        return {"version": platform.python_version(), "licence": PYTHON_LICENCE}
    distribution = (importlib.metadata.packages_distributions().get(package) or [package])[0]
    try:
        metadata: Any = importlib.metadata.metadata(distribution)
    except importlib.metadata.PackageNotFoundError:
        return {"version": "unknown", "licence": "unknown"}
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or [] if c.startswith("License")]
    declared = metadata.get("License-Expression") or "; ".join(classifiers) or (metadata.get("License") or "unknown")
    return {"version": metadata["Version"], "licence": declared.splitlines()[0][:100]}


def _dataset_origin(folder: Path) -> dict[str, Any]:
    """The lines on the licence in the data set's SOURCE.txt, which may stand one folder higher."""
    for place in (folder, folder.parent):
        if (place / "SOURCE.txt").is_file():
            lines = (place / "SOURCE.txt").read_text(encoding="utf-8").splitlines()
            return {"licence": " ".join(line for line in lines if "licen" in line.lower() or "CC BY" in line)}
    return {"licence": "unknown: no SOURCE.txt beside the data"}


# ---------------------------------------------------------------------------------------------------- reading a recipe

COMMON: dict[str, type] = {"kind": str, "limit": int, "optional": bool}
FILES: dict[str, type] = {"path": str, "damaged": str, "max_chars": int}
KINDS: dict[str, tuple[Builder, dict[str, type]]] = {
    "docstrings": (
        _docstrings,
        {
            "packages": list,
            "exclude": list,
            "documented_share": float,
            "web_share": float,
            "name_share": float,
            "min_body_lines": int,
            "max_chars": int,
        },
    ),
    "titles": (_titles, {"dataset": str}),
    "cloze": (_cloze, {"dataset": str, "per_document": int}),
    "queries": (_queries, {"dataset": str, "split": str, "hold_out_modulus": int}),
    "debian": (_files(debian_pairs), FILES),
    "wordnet": (_files(wordnet_pairs), FILES | {"direction": str}),
    "dictd": (_files(dictd_pairs), FILES | {"licence": str}),
    "man": (_files(man_pairs), FILES | {"any_licence": bool}),
    "pydoc": (_files(pydoc_pairs), FILES | {"licence": str}),
}
NEEDED: dict[str, tuple[str, ...]] = {
    "titles": ("dataset",),
    "cloze": ("dataset",),
    "queries": ("dataset", "split"),
    "dictd": ("path",),
    "pydoc": ("path",),
}


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; give a recipe such as configs/data/first.yaml") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from error
    if not isinstance(recipe, dict):
        raise InputError(f'{path}: expected a mapping with "sources", found {type(recipe).__name__}')
    refuse_unknown(recipe, ("seed", "sources", *clean.KEYS), str(path))
    clean.read_cleaning(recipe, str(path))
    if "seed" in recipe:
        _check_type(recipe["seed"], int, "seed", str(path))
    sources = recipe.get("sources")
    if not isinstance(sources, list) or not sources:
        raise InputError(f'{path}: "sources" must be a list with at least one source, found {sources!r}')
    for number, source in enumerate(sources, start=1):
        _check_source(source, f"{path}, source {number}")
    return recipe


def _check_source(source: Any, where: str) -> None:
    if not isinstance(source, dict) or "kind" not in source:
        raise InputError(f'{where}: expected a mapping with "kind" (one of {", ".join(KINDS)}), found {source!r}')
    refuse_unknown([source["kind"]], tuple(KINDS), where, what="kind")
    kind = source["kind"]
    types = COMMON | KINDS[kind][1]
    refuse_unknown(source, tuple(types), f"{where} ({kind})")
    for key, value in source.items():
        _check_type(value, types[key], key, f"{where} ({kind})")
    for key in NEEDED.get(kind, ()):
        if key not in source:
            raise InputError(f'{where} ({kind}): "{key}" is missing; add it')
    shares = [source.get(key, 0) for key in ("documented_share", "web_share", "name_share")]
    if any(not 0 <= share <= 1 for share in shares) or shares[1] + shares[2] > 1:
        raise InputError(f"{where} ({kind}): shares must be between 0 and 1, web_share and name_share together too")


def _check_type(value: Any, expected: type, key: str, where: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    right = {
        int: number and isinstance(value, int) and (value >= 1 or key == "seed"),
        float: number,
        list: isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value),
    }.get(expected, isinstance(value, expected))
    if not right:
        names = {int: "a whole number from 1", float: "a number", list: "a list of names", str: "a text"}
        raise InputError(f'{where}: "{key}" must be {names.get(expected, "true or false")}, found {value!r}')
