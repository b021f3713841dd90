"""Reading users' YAML files: all errors become a `yaml.YAMLError`, which callers turn into one line.

PyYAML lets other exceptions through from values that look like a date or carry a tag: `2001-99-99` is a ValueError,
`!!bool x` a KeyError, `!!timestamp x` an AttributeError, and deep nesting a RecursionError.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import yaml

from search_r3.files import decode_text

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
"""The recipes in a source checkout; an installed package has none."""


def where_recipes_are(path: str | Path) -> str:
    """A hint for a user whose recipe is not at `path`: where it is, or where recipes are."""
    here = CONFIGS.parent / path
    if not Path(path).is_absolute() and here.is_file():
        return f"it is in the source checkout, but paths are relative to the working folder; give {here}"
    if CONFIGS.is_dir():
        return f"example recipes are in {CONFIGS}"
    return "example recipes are in configs/ of the source repository, which is not part of an installed package"


def read_yaml(path: str | Path, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The document in a file of UTF-8 text; nothing in it can run code.

    Raises:
        OSError: the file cannot be read.
        InputError: it is not UTF-8 text.
        yaml.YAMLError: it is not valid, or a value in it cannot be read.
    """
    return parse_yaml(decode_text(Path(path).read_bytes(), path), loader)


def parse_yaml(text: str | IO[str], loader: type[yaml.SafeLoader | yaml.BaseLoader] = yaml.SafeLoader) -> Any:
    """The document in `text`; nothing in it can run code. BaseLoader leaves all values text.

    Raises:
        yaml.YAMLError: it is not valid, or a value in it cannot be read.
    """
    try:
        return yaml.load(text, loader)
    except UnicodeDecodeError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError(f"a value cannot be read ({type(error).__name__}: {error})") from error
