"""Extension point for training data: a `DataSource` names the files of a kind of source, and builds its pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from search_r3.data.pairs import TrainingPair

DataRoot = str | Path | None
Settings = dict[str, Any]
"""A source of a recipe without `kind` and `limit`; `damaged` is always there."""


@dataclass
class BuiltPairs:
    """The result of one source: its pairs, why others were dropped, its origin, and where it was damaged."""

    pairs: list[TrainingPair]
    dropped: Counter[str] = field(default_factory=Counter)
    origin: dict[str, Any] = field(default_factory=dict)
    damaged_places: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DataSource:
    """A kind of source that a recipe can name under `kind`.

    Attributes:
        build: settings, seed and data root -> the pairs. The same arguments and files must give the same pairs.
        reads: settings and data root -> name in the manifest -> file that `build` will read. A finished source is built
            again when one of these files, a setting, or the code of `build` and `reads` has changed.
        keys: the keys that a recipe may give, with their types: str, int, float, bool, or list (of texts).
        needed: the keys without a default.
        check: raises InputError if settings that each have the right type contradict each other.

    A complete example, in your own package::

        import json
        from pathlib import Path

        from search_r3.data.pairs import TrainingPair
        from search_r3.data.sources.data_source import BuiltPairs, DataSource

        def faq_files(settings, data_root):
            return {"faq.json": Path(settings["path"])}

        def faq_pairs(settings, seed, data_root):
            entries = json.loads(Path(settings["path"]).read_text(encoding="utf-8"))
            pairs = [TrainingPair(f"faq:{i}", e["question"], e["answer"], source="faq") for i, e in enumerate(entries)]
            return BuiltPairs(pairs, origin={"license": "CC0-1.0"})

        FAQ = DataSource(faq_pairs, faq_files, {"path": str}, needed=("path",))

    The package declares it by the entry point `faq = "my_package:FAQ"` in the group `search_r3.data_sources`, and a
    recipe uses it as `{kind: faq, path: faq.json}`.
    """

    build: Callable[[Settings, int, DataRoot], BuiltPairs]
    reads: Callable[[Settings, DataRoot], dict[str, Path]]
    keys: dict[str, type]
    needed: tuple[str, ...] = ()
    check: Callable[[Settings], None] | None = None
