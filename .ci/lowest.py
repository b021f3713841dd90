"""Prints the lowest versions that pyproject.toml allows, one requirement per line, for `make test-lowest`.

Torch is left out: its lowest version comes with CUDA only, gigabytes of it; the Makefile names the one for CPUs.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

EXTRAS = ("search", "evaluation", "server")
LEFT_OUT = ("torch", "search-r3")


def lowest() -> list[str]:
    """`name==version` for every requirement with a lower bound, of the core and of `EXTRAS`."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(line for name in EXTRAS for line in project["optional-dependencies"][name])]
    found = (re.match(r"([\w-]+)(?:\[.*\])?>=([\w.]+)", line) for line in wanted)
    return sorted({f"{match[1]}=={match[2]}" for match in found if match and match[1] not in LEFT_OUT})


if __name__ == "__main__":
    print("\n".join(lowest()))
