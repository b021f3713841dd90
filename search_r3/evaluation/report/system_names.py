"""Short names of systems for plots and headings: "sft, direct" for `search-r3-smollm2-135m-sft.off`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from search_r3.evaluation.publish.tables import LABELS, MODE_LABELS
from search_r3.evaluation.systems import ALL_MODES

SHORT_LABELS = LABELS | {"all-minilm-l6-v2": "MiniLM"}


def split_mode(system: str) -> tuple[str, str]:
    """The model and the mode of a system's name; the mode is "" for systems without modes, such as BM25."""
    for mode in sorted(ALL_MODES, key=len, reverse=True):
        if system.endswith(f".{mode}"):
            return system.removesuffix(f".{mode}"), mode
    return system, ""


CONTROL = "-control"
"""What the name of a model ends with that exists only to be compared with, trained like another but for one thing."""


def is_control_model(model: str) -> bool:
    """Whether a model exists only to be compared with, such as one that was trained without passages."""
    return model.endswith(CONTROL)


def is_control(mode: str) -> bool:
    """Whether a mode exists only to be compared with, such as "read.shuffled"."""
    return "." in mode


def short_models(models: Iterable[str]) -> dict[str, str]:
    """Models by what tells them apart: their names without the words, up to a hyphen, with which all of them begin."""
    words = {name: name.split("-") for name in dict.fromkeys(models)}
    shortest = min(map(len, words.values()), default=0)
    shared = 0
    while len(words) > 1 and shared < shortest - 1 and len({one[shared] for one in words.values()}) == 1:
        shared += 1
    return {name: "-".join(one[shared:]) for name, one in words.items()}


def models_of(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The SearchR3 models of metrics records, and their short names."""
    known = [split_mode(record["system"]) for record in records]
    return short_models(model for model, mode in known if mode)


def short_names(systems: Iterable[str]) -> dict[str, str]:
    """Short names of systems: label of a baseline, or the short model and its mode in words."""
    known = {name: split_mode(name) for name in dict.fromkeys(systems)}
    models = short_models(model for model, mode in known.values() if mode)
    return {
        name: f"{models[model]}, {MODE_LABELS.get(mode, mode)}" if mode else SHORT_LABELS.get(name, name)
        for name, (model, mode) in known.items()
    }


def short_mode(mode: str) -> str:
    """A mode of a study with the baselines' short labels: "MiniLM+reasoning" for `all-minilm-l6-v2+reasoning`."""
    for name, label in SHORT_LABELS.items():
        mode = mode.replace(name, label)
    return mode
