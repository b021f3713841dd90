"""YAML as users write it: whatever is wrong with it is a `yaml.YAMLError`, which every reader turns into one line.

PyYAML lets other exceptions through from values that look like a date or carry a tag: `2001-99-99` is a ValueError,
`!!bool x` a KeyError, `!!timestamp x` an AttributeError, and deep nesting a RecursionError.
"""

from __future__ import annotations

from typing import IO, Any

import yaml


def parse_yaml(text: str | IO[str], loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """The document in `text`; nothing in it can run code.

    Raises:
        yaml.YAMLError: it is not valid, or a value in it cannot be read.
    """
    try:
        return yaml.load(text, loader)
    except UnicodeDecodeError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError(f"a value cannot be read ({type(error).__name__}: {error})") from error
