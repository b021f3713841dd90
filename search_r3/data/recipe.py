"""Build one file of training pairs from a YAML recipe: `search-r3 data build RECIPE`.

The same recipe, seed and package versions give the same bytes; the manifest next to the output lists the inputs with
their licenses, what was dropped and why, and the output's SHA-256. An interrupted build resumes (see `build_cache`).
"""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_r3.config import read_mapping
from search_r3.data.beir import stable_order
from search_r3.data.build_cache import SUFFIX, BuildCache, added_code, key_of
from search_r3.data.io.input_stamps import described, stamps
from search_r3.data.io.line_reader import MissingSource
from search_r3.data.mining import decontamination
from search_r3.data.pairs import TrainingPair, write_pairs
from search_r3.data.sources.data_source import BuiltPairs, DataRoot, DataSource
from search_r3.data.sources.pair_files import default_name
from search_r3.data.sources.records import DAMAGED
from search_r3.data.sources.registry import COMMON, REGISTRY, RENAMED_KEYS
from search_r3.errors import InputError
from search_r3.files import atomic_write_text
from search_r3.hints import refuse_unknown


def build_pairs(
    recipe_path: str | Path,
    output: str | Path,
    data_root: DataRoot = None,
    seed: int | None = None,
    report: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Build the pairs of a recipe, shuffle them, and write OUTPUT (JSONL) and OUTPUT.manifest.json.

    Finished parts are kept in OUTPUT.partial until the end, so the same call resumes a build that was killed or that
    failed; its result is byte for byte that of an uninterrupted one.

    Args:
        recipe_path: a YAML file with `sources`, a list (see `configs/data/first.yaml`), and optionally `seed`,
            `damaged` ("refuse" or "skip", for sources without a setting of their own), `decontaminate` and
            `deduplicate` (see `decontamination.DecontaminateSettings` and `decontamination.DeduplicateSettings`).
        output: the JSONL file to write.
        data_root: where data sets named in the recipe are (see `find_dataset`).
        seed: overrides the recipe's seed; 0 if neither is given.
        report: called with one line per step.

    Returns:
        The manifest.

    Raises:
        InputError: the recipe is invalid (the source's number and key are named), a package or data set is missing,
            input is damaged and `damaged` is "refuse", a source yields no pair, another process builds this output, or
            it cannot be written.
    """
    kinds = REGISTRY.entries()
    recipe = read_recipe(Path(recipe_path), kinds)
    seed = recipe.get("seed", 0) if seed is None else seed
    output = Path(output)
    if output.is_dir():
        raise InputError(f"{output} is a folder; name the file to write, such as {output / 'pairs.jsonl'}")
    report = report or (lambda line: None)
    with BuildCache(output) as cache:
        collected = _Collected(seed)
        for number, source in enumerate(recipe["sources"], start=1):
            where = f"{recipe_path}, source {number} ({source['kind']})"
            settings = {"damaged": recipe.get("damaged", "refuse")} | source
            report(f"source {number} of {len(recipe['sources'])}: {_title(source)}")
            built, inputs, again = _built_or_missing(settings, kinds[source["kind"]], seed, data_root, cache, where)
            new = collected.add(source, built, inputs, where)
            report(f"  {new:,} pairs{_finished_before(again, built)}")
        if any(key in recipe for key in decontamination.KEYS):
            report(f"cleaning {len(collected.pairs):,} pairs")
        cleaned, cleaning = decontamination.clean_pairs(
            list(collected.pairs.values()), recipe, str(recipe_path), data_root, cache
        )
        collected.pairs.clear()
        by_id = {pair.id: pair for pair in cleaned}
        report(f"writing {len(by_id):,} pairs")
        written = cache.folder / f"output{SUFFIX}"
        write_pairs(written, (by_id[name] for name in stable_order(by_id, seed)))
        manifest = {
            "output": output.name,
            **{key: value for key, value in described({"output": written}).items() if key != "files"},
            "count": len(by_id),
            "seed": seed,
            "python": platform.python_version(),
            "sources": collected.reports,
            "recipe": recipe,
        }
        if cleaning is not None:
            manifest["cleaning"] = cleaning
        os.replace(written, output)
        atomic_write_text(f"{output}.manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
        cache.remove()
    return manifest


@dataclass
class _Collected:
    """The distinct pairs of all sources so far, and each source's entry in the manifest."""

    seed: int
    pairs: dict[tuple[str, str], TrainingPair] = field(default_factory=dict)
    reports: list[dict[str, Any]] = field(default_factory=list)
    _ids: set[str] = field(default_factory=set)

    def add(self, source: dict[str, Any], built: BuiltPairs, inputs: dict[str, Any] | None, where: str) -> int:
        """Add the pairs of a source, at most its limit; returns how many are new.

        Raises:
            InputError: none is new, and the source is not optional.
        """
        chosen = built.pairs
        if "limit" in source and len(chosen) > source["limit"]:
            kept = set(stable_order((pair.id for pair in chosen), self.seed)[: source["limit"]])
            built.dropped["over the limit"] += len(chosen) - len(kept)
            chosen = [pair for pair in chosen if pair.id in kept]
        counts: Counter[str] = Counter()
        for pair in chosen:
            if (pair.query, pair.positive) in self.pairs or pair.id in self._ids:
                built.dropped["already given by another source"] += 1
            else:
                self.pairs[pair.query, pair.positive] = pair
                self._ids.add(pair.id)
                counts[pair.source] += 1
        if not counts and not source.get("optional"):
            raise InputError(f"{where}: it yields no pair ({_reasons(built)}); loosen its settings or remove it")
        self.reports.append(
            {
                **source,
                "count": counts.total(),
                "by_source": dict(sorted(counts.items())),
                "dropped": dict(sorted(built.dropped.items())),
                **({"damaged_places": built.damaged_places} if built.damaged_places else {}),
                **({"inputs": inputs} if inputs else {}),
                **built.origin,
            }
        )
        return counts.total()


def _built_or_missing(
    source: dict[str, Any], kind: DataSource, seed: int, data_root: DataRoot, cache: BuildCache, where: str
) -> tuple[BuiltPairs, dict[str, Any] | None, bool]:
    """A source's pairs, its inputs, and whether they came from the cache; no pairs for a missing optional source. Error
    messages start with `where`."""
    try:
        return _built(source, kind, seed, data_root, cache)
    except MissingSource as error:
        if not source.get("optional"):
            raise InputError(f'{where}: {error}; or mark the source "optional: true"') from error
        return BuiltPairs([], origin={"missing": str(error)}), None, False
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _built(
    source: dict[str, Any], kind: DataSource, seed: int, data_root: DataRoot, cache: BuildCache
) -> tuple[BuiltPairs, dict[str, Any], bool]:
    settings = {key: value for key, value in source.items() if key not in ("kind", "limit")}
    files = kind.reads(settings, data_root)
    read = stamps(files)
    key = key_of(source["kind"], settings, seed, read, *added_code(kind.build, kind.reads))
    found = cache.load(source["kind"], key)
    if found:
        head, rows = found
        pairs = [TrainingPair.from_row(row) for row in rows]
        return BuiltPairs(pairs, Counter(head["dropped"]), head["origin"], head["damaged_places"]), head["inputs"], True
    built = kind.build(settings, seed, data_root)
    inputs = described(files)
    if stamps(files) != read:
        raise InputError("its files changed while they were read; run the same command again")
    head = {
        "dropped": built.dropped,
        "origin": built.origin,
        "damaged_places": built.damaged_places,
        "inputs": inputs,
    }
    cache.save(source["kind"], key, head, (pair.as_row() for pair in built.pairs))
    return built, inputs, False


def _title(source: dict[str, Any]) -> str:
    what = source.get("dataset") or source.get("path") or ", ".join(source.get("packages", [])[:3])
    return f"{source['kind']} {what}".rstrip()


def _reasons(built: BuiltPairs) -> str:
    places = [f"{reason} in {named[0]}" for reason, named in built.damaged_places.items()]
    counts = [f"{reason}: {count:,}" for reason, count in sorted(built.dropped.items())]
    return "; ".join([*counts, *places]) or "nothing in it"


def _finished_before(again: bool, built: BuiltPairs) -> str:
    damaged = sum(count for reason, count in built.dropped.items() if reason.startswith("damaged: "))
    skipped = f", {damaged:,} damaged records skipped" if damaged else ""
    return skipped + (" (finished before)" if again else "")


# ---------------------------------------------------------------------------------------------------- reading a recipe


def read_recipe(path: Path, kinds: Mapping[str, DataSource]) -> dict[str, Any]:
    """A recipe whose keys and values are checked; `kinds` are the sources that it may name.

    Raises:
        InputError: the file cannot be read, or a key or value is wrong (the source's number is named).
    """
    recipe = read_mapping(path)
    refuse_unknown(recipe, ("seed", "damaged", "sources", *decontamination.KEYS), str(path))
    if "damaged" in recipe:
        refuse_unknown([recipe["damaged"]], DAMAGED, f"{path}, damaged", what="value")
    decontamination.read_cleaning(recipe, str(path))
    if "seed" in recipe:
        _check_type(recipe["seed"], int, "seed", str(path))
    sources = recipe.get("sources")
    if not isinstance(sources, list) or not sources:
        raise InputError(f'{path}: "sources" must be a list with at least one source, got {sources!r}')
    for number, source in enumerate(sources, start=1):
        _check_source(source, f"{path}, source {number}", kinds)
    _check_names(sources, path)
    return recipe


def _check_names(sources: list[dict[str, Any]], path: Path) -> None:
    """Check that each of a user's own files has a different name, since the ids of its pairs begin with it."""
    named: dict[tuple[str, str], int] = {}
    for number, source in enumerate(sources, start=1):
        kind = source["kind"]
        if kind in ("pairs", "datasets"):
            name = source.get("name") or default_name(source["path"])
            if (kind, name) in named:
                both = f'source {named[kind, name]} is also called "{name}"'
                raise InputError(
                    f'{path}, source {number} ({kind}): {both}; give one another "name", since ids begin with it'
                )
            named[kind, name] = number


def _check_source(source: Any, where: str, kinds: Mapping[str, DataSource]) -> None:
    if not isinstance(source, dict) or "kind" not in source:
        raise InputError(f'{where}: expected a mapping with "kind" (one of {", ".join(kinds)}), got {source!r}')
    refuse_unknown([source["kind"]], tuple(kinds), where, what="kind")
    where, kind = f"{where} ({source['kind']})", kinds[source["kind"]]
    types = COMMON | kind.keys
    for old, new in RENAMED_KEYS.items():
        if old in source and new in types:
            raise InputError(f'{where}: the key "{old}" is now called "{new}"; rename it')
    refuse_unknown(source, tuple(types), where)
    for key, value in source.items():
        _check_type(value, types[key], key, where)
    for key in kind.needed:
        if key not in source:
            raise InputError(f'{where}: "{key}" is missing; add it')
    if "damaged" in source:
        refuse_unknown([source["damaged"]], DAMAGED, f"{where}, damaged", what="value")
    if kind.check is not None:
        try:
            kind.check(source)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


def _check_type(value: Any, expected: type, key: str, where: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    right = {
        int: number and isinstance(value, int) and (value >= 1 or key == "seed"),
        float: number,
        list: isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value),
    }.get(expected, isinstance(value, expected))
    if not right:
        names = {int: "a whole number from 1", float: "a number", list: "a list of names", str: "a text"}
        raise InputError(f'{where}: "{key}" must be {names.get(expected, "true or false")}, got {value!r}')
