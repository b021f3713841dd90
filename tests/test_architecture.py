"""Who may import whom, by the table of ARCHITECTURE.md, so that the two cannot differ; every module is named there."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from search_r3.plugins import GROUPS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "search_r3"
FILES = sorted(PACKAGE.rglob("*.py"))
FRONT_DOOR = {"SearchR3": "model", "Reasoned": "model", "InputError": "errors"}
"""Names that `search_r3/__init__.py` hands out, and the packages that they are in."""


def package_of(file: Path) -> str:
    """`search_r3/index/build/pipeline.py` -> "index"; `__main__.py` -> "cli"; the package's `__init__.py` -> ""."""
    parts = file.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else {"__init__": "", "__main__": "cli"}.get(file.stem, file.stem)


PACKAGES = {package_of(file) for file in FILES} - {""}
FILE_ENDINGS = {"json", "jsonl", "npz", "css", "html", "png", "txt", "py", "safetensors"}


def allowed_imports() -> dict[str, set[str]]:
    """The table of ARCHITECTURE.md: package -> the packages that it may import (its own always among them)."""
    table: dict[str, set[str]] = {}
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for line in text.partition("## Who may import whom\n")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        names = re.findall(r"`(\w+)`", cells[0])
        if not line.startswith("|") or len(cells) < 2 or not names:
            continue
        if cells[1] == "everything":
            may = set(PACKAGES)
        else:
            may = {name.strip() for name in cells[1].split(",") if name.strip()}
        for name in names:
            table[name] = may | {name}
    return table


def imports(file: Path, *, everywhere: bool = True) -> Iterator[tuple[int, str, str]]:
    """(line, module, name imported from it) of every import; `everywhere` also looks inside functions.

    Imports under `if TYPE_CHECKING:` count as inside: they never run.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else _at_import(tree.body):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}, line {node.lineno}: relative import; write the module's full name"
            yield from ((node.lineno, node.module or "", alias.name) for alias in node.names)


def packages_imported(file: Path) -> Iterator[tuple[int, str]]:
    """(line, package of ours) of every import."""
    for line, module, name in imports(file):
        if module.split(".")[0] == "search_r3":
            target = [*module.split("."), name][1]
            if target != "__version__":
                yield line, FRONT_DOOR.get(target, target)


def _at_import(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The statements that run when a module is imported, without the bodies of functions."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _at_import(node.orelse)
            continue
        yield node
        for block in ("body", "orelse", "finalbody"):
            yield from _at_import(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from _at_import(handler.body)


def docstrings(file: Path) -> list[str]:
    """The docstrings of a file, those below a field or a constant too."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    values = [node.value.value for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return [value for value in values if isinstance(value, str)]


def names_of(file: Path) -> set[str]:
    """Every name that a file defines, imports or uses: functions, classes, constants, parameters, attributes."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return {value for node in nodes for key in ("name", "id", "attr", "arg") if (value := getattr(node, key, None))}


def assigned(node: ast.stmt) -> set[str]:
    """What a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_every_package_is_in_the_table_and_every_row_is_a_package():
    table = allowed_imports()
    assert table.keys() >= PACKAGES, f"ARCHITECTURE.md says nothing of {sorted(PACKAGES - table.keys())}"
    for package, may in table.items():
        assert may <= table.keys(), f"the row of {package} names unknown packages {sorted(may - table.keys())}"


def test_arrows_point_one_way():
    """No two packages may import each other, directly or round about."""
    table = {package: may - {package} for package, may in allowed_imports().items()}

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        return any(n == goal or (n not in seen and reaches(n, goal, seen | {n})) for n in table[start] if n in table)

    for package in table.keys() - {"cli"}:
        assert not reaches(package, package, set()), f"{package} can import itself through others"


def test_modules_import_each_other_one_way():
    """Inside a package too, imports of functions and of types included: what two modules share is in a third."""
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}
    arrows: dict[str, set[str]] = {}
    for name, file in names.items():
        found = {f"{module}.{thing}" if f"{module}.{thing}" in names else module for _, module, thing in imports(file)}
        arrows[name] = found & names.keys() - {name, "search_r3"}  # the front door imports what is asked for
    TopologicalSorter(arrows).prepare()  # a CycleError names the circle


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_a_package_imports_only_what_its_row_allows(file: Path):
    package = package_of(file)
    if not package:  # the package's front door: it may hand out names, and must stay quick, see test_import_time
        return
    may = allowed_imports()[package]
    for line, target in packages_imported(file):
        assert target in may, f"{file.relative_to(ROOT)}, line {line}: {package} may not import {target}"


def test_the_table_allows_only_what_is_imported():
    imported: dict[str, set[str]] = {package: set() for package in PACKAGES}
    for file in FILES:
        imported.get(package_of(file), set()).update(target for _, target in packages_imported(file))
    spare = {package: may - imported[package] - {package} for package, may in allowed_imports().items()}
    assert {package: names for package, names in spare.items() if names and package != "cli"} == {}


def test_training_runs_where_only_the_core_requirements_are():
    """At import, `training` and all that it may import from touch nothing beyond `dependencies` in pyproject.toml."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    core = {re.match(r"[\w-]+", requirement).group().lower() for requirement in requirements}  # type: ignore[union-attr]
    core = {{"pyyaml": "yaml"}.get(name, name) for name in core} | {"search_r3"} | set(sys.stdlib_module_names)
    optional = {"retrievers"}  # a core install has no BM25; mining imports it where it is used
    packages = allowed_imports()["training"] - optional
    checked = [file for file in FILES if package_of(file) in packages]
    assert any(package_of(file) == "training" for file in checked)
    for file in checked:
        for line, module, name in imports(file, everywhere=False):
            where = f"{file.relative_to(ROOT)}, line {line}"
            assert module.split(".")[0] in core, f"{where}: {module} is not a core requirement; import it where used"
            assert [*module.split("."), name, ""][1] not in optional, f"{where}: import retrievers where it is used"


def test_only_the_lance_backend_and_what_it_builds_on_know_lancedb():
    """The rest of `index` queries and changes rows through `LanceBackend`."""
    folders = ("index/backends/lance/", "index/storage/", "index/distributed/")
    for file in FILES:
        name = file.relative_to(PACKAGE).as_posix()
        for line, module, _ in imports(file):
            if module.split(".")[0] in {"lance", "lancedb"}:
                assert name.startswith(folders), f"{name}, line {line}: ask LanceBackend rather than {module}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(PACKAGE).as_posix())
def test_a_module_says_what_it_is(file: Path):
    text = file.read_text(encoding="utf-8")
    assert not text or ast.get_docstring(ast.parse(text)), f"{file.relative_to(ROOT)} has no docstring"


def test_architecture_names_every_module_and_no_other():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    stems = {file.stem for file in FILES} - {"__init__", "__main__"}
    assert {stem for stem in stems if not re.search(rf"(?<!\w){stem}(?!\w)", text)} == set()
    named = set(re.findall(r"`(?:[\w/]+/)?(\w+)\.py`", text))
    assert named - stems - {"__init__", "test_architecture"} == set(), "files that are gone"


def test_what_a_docstring_names_is_there():
    """`module.name` in a docstring is a name in that module, and "see `name`" is one of its file or of the package."""
    modules = {tuple(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
    modules = {parts[:-1] if parts[-1] == "__init__" else parts: file for parts, file in modules.items()}
    defined = {parts: names_of(file) for parts, file in modules.items()}
    everywhere = {part for parts in modules for part in parts} | {
        name for file in FILES for node in ast.parse(file.read_text()).body for name in assigned(node)
    }

    def resolves(words: list[str], own: set[str]) -> bool:
        if words[0] == "search_r3" and words[1] in (*GROUPS, "GROUP"):  # entry points
            return True
        for at in range(len(words), 0, -1):
            found = [parts for parts in modules if list(parts[-at:]) == words[:at]]
            if any(len(words) == at or words[at] in defined[parts] for parts in found):
                return True
        return words[0] in own  # an attribute of a parameter or of a name of this file

    wrong = []
    for parts, file in modules.items():
        for text in docstrings(file):
            named = re.findall(r"`([a-z]\w*(?:\.\w+)+)`", text)
            internal = [name.split(".") for name in named if name.split(".")[0] in everywhere]
            dotted = [words for words in internal if words[-1] not in FILE_ENDINGS]
            wrong += [f"{file.name}: {'.'.join(words)}" for words in dotted if not resolves(words, defined[parts])]
            single = re.findall(r"[Ss]ee `(\w+)`", text)
            wrong += [f"{file.name}: {name}" for name in single if name not in everywhere | defined[parts]]
    assert wrong == []
