"""The file of `search-r3 serve --settings`: limits and times that can be changed while the server runs (SIGHUP)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from search_r3.config import load_config
from search_r3.errors import InputError

CONFIG_NAMES = {"budget": "reasoning_tokens", "max_budget": "max_reasoning_tokens"}
"""Settings whose field of `ServerConfig` is called otherwise."""


@dataclass(frozen=True)
class Settings:
    """What the file may set, under the names of the options; what is missing or null is left to the option."""

    max_items: int | None = None
    max_request_tokens: int | None = None
    max_body: int | None = None
    queue: int | None = None
    timeout: float | None = None
    pause: float | None = None
    grace: float | None = None
    budget: int | None = None
    max_budget: int | None = None


def read_settings(file: Path, options: Collection[str] = ()) -> dict[str, Any]:
    """The settings in a YAML file, by the names of `ServerConfig`'s fields.

    Args:
        options: the names of options that were given on the command line, which the file must not set as well.

    Raises:
        InputError: the file is missing or not valid, a key is unknown, or an option says the same.
    """
    given = {name: value for name, value in asdict(load_config(file, Settings)).items() if value is not None}
    for name in given:
        if name in options:
            raise InputError(f"{file}: {name} is also given as --{name.replace('_', '-')}; remove one of them")
    return {CONFIG_NAMES.get(name, name): value for name, value in given.items()}
