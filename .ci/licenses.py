"""Checks the license of every package in `constraints.txt` against `.ci/licenses.toml`, offline and in about a second.

    python .ci/licenses.py           # a line for each package that is not allowed, and exit code 1; `make lint` runs it
    python .ci/licenses.py list      # the license of every package

The licenses are those that installed packages state: the SPDX expression of PEP 639, else the classifier of PyPI, else
the first line of the old field.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",  # or one of the other BSD licenses, which ask for less
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
NOT_LICENSES = {"DFSG approved", "OSI Approved"}
FIELDS = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "mit license": "MIT",
}
"""What packages write into the old field instead of an SPDX identifier, in lower case."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / ".ci" / "licenses.toml").read_text(encoding="utf-8"))


def locked(text: str) -> list[str]:
    """The names of the lines `name==version ; marker`."""
    return [canonical(name) for name in re.findall(r"^([A-Za-z0-9][\w.-]*)==", text, flags=re.MULTILINE)]


def stated_by(metadata: Any) -> str | None:
    """The license that a package's metadata states, as an SPDX expression; None if it does not."""
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = [
        one.split(" :: ")[-1] for one in metadata.get_all("Classifier") or [] if one.startswith("License ::")
    ]
    classifiers = [one for one in classifiers if one not in NOT_LICENSES]
    if classifiers and all(one in CLASSIFIERS for one in classifiers):  # several may be a choice, or hold together
        return " AND ".join(CLASSIFIERS[one] for one in classifiers)
    lines = (metadata.get("License") or "").strip().splitlines()
    return FIELDS.get(lines[0].strip().lower(), lines[0].strip()) if lines else None


def is_allowed(expression: str, allowed: set[str]) -> bool:
    """Whether an SPDX expression can be met by the allowed licenses alone. ("A WITH exception" permits more than A.)

    Raises:
        ValueError: it is not an expression of identifiers, AND, OR, WITH and parentheses.
    """
    parts = re.findall(r"[()]|[^\s()]+", re.sub(r"\s+WITH\s+[\w.-]+", "", expression))
    value = _either(parts, allowed)
    if parts:
        raise ValueError(f"{expression!r} is not understood from {parts[0]!r} on")
    return value


def _either(parts: list[str], allowed: set[str]) -> bool:
    """The value of the expression at the beginning of `parts`, whose parts are removed from there."""
    values = [_all(parts, allowed)]
    while parts[:1] == ["OR"]:
        del parts[0]
        values.append(_all(parts, allowed))
    return any(values)


def _all(parts: list[str], allowed: set[str]) -> bool:
    values = [_single(parts, allowed)]
    while parts[:1] == ["AND"]:
        del parts[0]
        values.append(_single(parts, allowed))
    return all(values)


def _single(parts: list[str], allowed: set[str]) -> bool:
    if not parts or parts[0] in ("AND", "OR", ")"):
        raise ValueError(f"a license is missing before {' '.join(parts) or 'the end'!r}")
    if (word := parts.pop(0)) != "(":
        return word in allowed
    value = _either(parts, allowed)
    if not parts or parts.pop(0) != ")":
        raise ValueError("a parenthesis is not closed: '('")
    return value


def needed_by_users() -> set[str]:
    """The packages that the project and its extras other than `dev` need, as far as they are installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    waiting = [Requirement(one) for one in project["dependencies"]]
    waiting += [Requirement(one) for name, ones in extras.items() if name != "dev" for one in ones]
    seen: set[tuple[str, str]] = set()
    while waiting:
        one = waiting.pop()
        name = canonical(one.name)
        for extra in ("", *one.extras):
            if (name, extra) in seen or name == "search-r3":
                continue
            seen.add((name, extra))
            waiting += _requirements(name, extra)
    return {name for name, _ in seen}


def _requirements(name: str, extra: str) -> Iterator[Requirement]:
    try:
        listed = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for one in map(Requirement, listed):
        without = one.marker is None or one.marker.evaluate({"extra": ""})
        if (extra == "" and without) or (extra and not without and one.marker.evaluate({"extra": extra})):
            yield one


def licenses(names: list[str], stated: dict[str, str]) -> dict[str, str | None]:
    """The license of each package: what it states itself, else what `stated` says; None if neither does."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            own = stated_by(importlib.metadata.metadata(name))
        except importlib.metadata.PackageNotFoundError:
            own = None
        found[name] = own or stated.get(name)
    return found


def problems(names: list[str], rules: dict[str, Any]) -> list[str]:
    """One line for each package whose license is unknown or not allowed, and for each rule that is of no use."""
    allowed, lines = set(rules["allowed"]), []
    for_users = needed_by_users()
    exceptions = {pattern: rule for patterns, rule in rules["exceptions"].items() for pattern in patterns.split()}
    for name, license in licenses(names, rules["stated"]).items():
        rule = next((rule for pattern, rule in exceptions.items() if fnmatch(name, pattern)), None)
        if license is not None and _allowed(license, allowed):
            continue
        if rule is None and license is None:
            lines.append(f"{name}: its metadata does not state a license; look it up and add it to .ci/licenses.toml")
        elif rule is None or (license is not None and rule["states"] not in license):
            lines.append(f"{name}: {license} is not among the allowed licenses; see .ci/licenses.toml")
        elif rule.get("only") == "development" and name in for_users:
            lines.append(f"{name} ({license}) is needed by an extra other than dev; remove it from there")
    unused = [name for name in rules["stated"] if name not in names]
    unused += [pattern for pattern in exceptions if not any(fnmatch(name, pattern) for name in names)]
    return lines + [f"{name} is not in constraints.txt; remove it from .ci/licenses.toml" for name in unused]


def _allowed(license: str, allowed: set[str]) -> bool:
    try:
        return is_allowed(license, allowed)
    except ValueError:  # a sentence instead of an expression
        return False


def main(arguments: list[str]) -> int:
    rules, names = settings(), locked((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    if arguments == ["list"]:
        for name, license in licenses(names, rules["stated"]).items():
            print(f"{name:40} {license}")
        return 0
    found = problems(names, rules)
    print("\n".join(found) if found else f"{len(names)} licenses are allowed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
