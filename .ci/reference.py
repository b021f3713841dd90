"""Generates docs/cli.md and docs/configuration.md from the code (`make docs`); a test checks that they are current.

The command line's page comes from the typer app, the configuration's from the dataclasses and the docstring under each
of their fields; the keys of a data recipe's sources come from the docstrings of the functions that read them.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = "<!-- Written by `make docs` from the code: change it there, not here. -->"
METAVARS = {str: "TEXT", int: "N", float: "NUMBER", Path: "PATH"}
WORDS = {
    str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path", list: "list of texts",
    type(None): "null", Any: "value",
}  # fmt: skip
REQUIRED = "required"


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A Markdown table; pipes inside cells are escaped."""

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|---" * len(head) + "|", *map(line, rows)]


# --------------------------------------------------------------------------------------------------------- cli.md

CLI_HEAD = f"""{WRITTEN}

# Command line

`search-r3 COMMAND --help` prints the same text as this page. Commands with machine-readable output have `--json`.
Invalid input gives one line that starts with `error:`, and exit code 2.
"""

GROUPS = {
    "search": (
        "demo", "ask", "index", "search", "tune", "delete", "compact", "backup", "restore", "serve", "encode", "mcp"
    ),
    "measure": ("evaluate", "mteb", "study", "rollouts", "report", "tables"),
    "make training data": (
        "data build", "data synthesize", "data embed-teacher", "data select", "data mine", "data reason", "data read",
        "data query-normalizer", "data fresh"
    ),
    "train": ("train sft", "train grpo", "train average", "adapt", "plot", "card"),
    "share": ("models", "export", "push", "pull"),
}  # fmt: skip


def cli_page() -> str:
    """docs/cli.md: an overview of all commands, then each with its arguments and options."""
    import typer

    from search_r3.cli.commands import app

    commands = dict(_commands(typer.main.get_command(app), "search-r3"))
    order = [f"search-r3 {name}" for names in GROUPS.values() for name in names]
    if set(order) != set(commands):
        raise SystemExit(f"error: GROUPS in .ci/reference.py differs from the commands: {set(order) ^ set(commands)}")
    lines = [CLI_HEAD.rstrip("\n")]
    for title, names in GROUPS.items():
        listed = [f"search-r3 {name}" for name in names]
        rows = [(f"[`{name}`](#{slug(name)})", paragraphs(commands[name].help)[0]) for name in listed]
        lines += ["", *table((title, ""), rows)]
    for name in order:
        lines += ["", f"## {name}", "", *_command(name, commands[name])]
    return "\n".join(lines) + "\n"


def _commands(group: Any, name: str) -> Iterable[tuple[str, Any]]:
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{name} {key}")
        elif not command.hidden:
            yield f"{name} {key}", command


def _command(name: str, command: Any) -> list[str]:
    hints = typing.get_type_hints(inspect.unwrap(command.callback))
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter not in arguments and not parameter.hidden]
    words = [_argument(parameter) for parameter in arguments]
    lines = ["```sh", " ".join([name, *words, *(["[OPTIONS]"] if options else [])]), "```", "", *_help(command.help)]
    rows = []
    for parameter in (*arguments, *options):
        named = f"`{parameter.name.upper()}`" if parameter in arguments else _option(parameter, hints[parameter.name])
        rows.append((named, REQUIRED if parameter.required else shown(parameter.default), parameter.help or ""))
    return [*lines, "", *table(("argument or option", "default", "meaning"), rows)]


def _argument(parameter: Any) -> str:
    word = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    return word if parameter.required else f"[{word}]"


def _option(parameter: Any, hint: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if parameter.is_flag:
        return names
    return f"{names[:-1]} {parameter.metavar or _metavar(hint)}`"


def _metavar(hint: Any) -> str:
    inner = next(member for member in _members(hint) if member is not type(None))
    if typing.get_origin(inner) is list:
        (inner,) = typing.get_args(inner)
    if isinstance(inner, type) and issubclass(inner, Enum):
        return "|".join(str(member.value) for member in inner)
    return METAVARS[inner]


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a help text, each joined into one line; lines after a line "\\b" are kept."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(text))
    return [block if block.startswith("\b") else " ".join(block.split()) for block in blocks]


def _help(text: str) -> list[str]:
    lines: list[str] = []
    for paragraph in paragraphs(text):
        example = paragraph.removeprefix("\b\n")
        lines += [paragraph, ""] if example == paragraph else ["```text", example, "```", ""]
    return lines[:-1]


# ----------------------------------------------------------------------------------------------- configuration.md

CONFIGURATION_HEAD = f"""{WRITTEN}

# Configuration

Every key of every YAML file that a command reads, with its type, its default and what it means. An unknown key is
refused with the nearest valid name, and a value of the wrong type with its key and what was expected.
`--set section.key=value` changes one key for one run (`train sft`, `train grpo`, `evaluate SUITE`). Paths in a file are
relative to the folder that the command is run in. Recipes to begin with are in `configs/`; [recipes.md](recipes.md)
says which machine each is for.
"""


class Section(NamedTuple):
    """A section of the page: heading, introduction, and the dataclass whose fields it lists."""

    level: int
    title: str
    says: str
    of: type | None = None


SERVER = """`search_r3.server.server_config.ServerConfig` in Python; [`search-r3 serve`](cli.md#search-r3-serve) has
options for most of it. [server.md](server.md#limits) says what happens beyond a limit."""


REWARDS = """Each entry of `environment.rewards`: `name`, `weight` (1 by default) and the reward's parameters.
`dcg_scaled` and `dcg` have none. [write-your-own/reward.md](write-your-own/reward.md) adds others."""
REFRESH = """`environment.refresh`: `policy` (`selective` by default) and that policy's parameters. `none` has none.
[write-your-own/refresh-policy.md](write-your-own/refresh-policy.md) adds others."""


def sections() -> list[Section]:
    """The sections of the page, in order."""
    from search_r3.data.fresh.fresh_config import FreshConfig
    from search_r3.data.fresh.fresh_config import Source as Package
    from search_r3.data.mining.decontamination import DecontaminateSettings, DeduplicateSettings, EvaluationSet
    from search_r3.environment.environment_config import EnvironmentConfig
    from search_r3.environment.refresh_policies import Full, RandomRows, Selective
    from search_r3.environment.rewards import MarginRank
    from search_r3.evaluation.baselines.external_models import ExternalModelConfig
    from search_r3.evaluation.suite_config import StudyPlan, SuitePlan
    from search_r3.server.server_config import ServerConfig
    from search_r3.training.config import LoopConfig, LoraSettings
    from search_r3.training.grpo.grpo_config import GRPOConfig, QuerySet, Source
    from search_r3.training.sft.sft_config import LossWeights, SFTConfig

    return [
        Section(2, "Stage 1", "`search-r3 train sft CONFIG`; [stage1.md](stage1.md) explains the choices.", SFTConfig),
        Section(3, "Loss weights", "`weights` of stage 1.", LossWeights),
        Section(2, "Stage 2", "`search-r3 train grpo CONFIG`; [stage2.md](stage2.md) explains them.", GRPOConfig),
        Section(3, "Query sets", "Each entry of `queries` of stage 2.", QuerySet),
        Section(3, "Document sources", "Each entry of `corpus` of stage 2.", Source),
        Section(3, "Environment", "`environment` of stage 2: the reward and its shaping.", EnvironmentConfig),
        Section(3, "Rewards", REWARDS),
        Section(4, "Reward margin_rank", "Its parameters.", MarginRank),
        Section(3, "Refresh policies", REFRESH),
        Section(4, "Policy selective", "The batch's positives, the candidates, and their neighbors.", Selective),
        Section(4, "Policy random", "Rows drawn from the whole corpus.", RandomRows),
        Section(4, "Policy full", "All documents, now and then.", Full),
        Section(2, "Both stages", "Sections that both recipes have."),
        Section(3, "LoRA", "`lora`: the adapter.", LoraSettings),
        Section(3, "Training loop", "`loop`: length, optimizer, schedule, checkpoints, evaluations.", LoopConfig),
        Section(2, "Training pairs", "`search-r3 data build RECIPE OUTPUT`."),
        Section(3, "Deduplication", "`deduplicate` of a data recipe.", DeduplicateSettings),
        Section(3, "Decontamination", "`decontaminate` of a data recipe.", DecontaminateSettings),
        Section(3, "Evaluation sets", "Each entry of `decontaminate.against`.", EvaluationSet),
        Section(3, "Sources", "Each entry of `sources`: the keys of all kinds, then those of each kind."),
        Section(2, "Fresh test sets", "`search-r3 data fresh RECIPE`; see [fresh.md](fresh.md).", FreshConfig),
        Section(3, "Packages", "Each entry of `packages`: a path alone, or these keys.", Package),
        Section(2, "Suites", "`search-r3 evaluate SUITE`.", SuitePlan),
        Section(3, "Studies", "`studies` of a suite.", StudyPlan),
        Section(
            2,
            "Other systems",
            "`--system FILE.yaml`; [evaluation.md](evaluation.md#other-systems).",
            ExternalModelConfig,
        ),
        Section(2, "Server", SERVER, ServerConfig),
    ]


RECIPE = [
    ("`sources`", "list", REQUIRED, "Where pairs come from; see [Sources](#sources)."),
    ("`seed`", "whole number", "`0`", "Decides everything that is drawn; `--seed` takes its place."),
    ("`damaged`", "`refuse` or `skip`", "`refuse`", "Default for sources that do not set `damaged`."),
    ("`deduplicate`", "[Deduplication](#deduplication)", "none", "Drops exact and near copies."),
    ("`decontaminate`", "[Decontamination](#decontamination)", "none", "Drops what overlaps evaluation sets."),
]  # fmt: skip
EVERY_SOURCE = {
    "kind": "One of those below.",
    "limit": "Keep at most this many pairs, chosen by a hash of their ids and the seed.",
    "optional": "Leave the source out where its files or packages are missing, instead of ending with an error.",
    "damaged": "`refuse` names file and line of what cannot be read and stops; `skip` leaves it out and counts it.",
}
DATASET = (
    "The data set: a name below the data root, a BEIR folder, `ir_datasets:NAME`, `mteb:TASK`, `hf:OWNER/NAME` or "
    "`nanobeir:NAME`."
)
BESIDE = {
    "dataset": DATASET,
    "exclude": "Data sets whose documents must not appear among the functions.",
    "split": "The split whose queries are taken; `test` is refused.",
    "reasoning": "Take the reasoning of `reasoning.jsonl` in the data set's folder, of this split's queries only.",
}
"""Keys of sources that their functions take in another form."""


def readers() -> dict[str, Callable[..., Any]]:
    """Kind of source -> the function whose docstring explains its keys."""
    from search_r3.data.sources import beir_pairs as titles
    from search_r3.data.sources import debian, dictionaries, docstrings, generated_questions, hf_pairs, manuals
    from search_r3.data.sources import pair_files as own

    return {
        "docstrings": docstrings.docstring_pairs,
        "titles": titles.title_pairs,
        "cloze": titles.cloze_pairs,
        "questions": generated_questions.question_pairs,
        "queries": titles.query_pairs,
        "debian": debian.debian_pairs,
        "wordnet": dictionaries.wordnet_pairs,
        "dictd": dictionaries.dictd_pairs,
        "man": manuals.man_pairs,
        "pydoc": manuals.pydoc_pairs,
        "pairs": own.own_pairs,
        "datasets": hf_pairs.hf_pairs,
    }


def configuration_page() -> str:
    """docs/configuration.md: every key of every configuration file, by dataclass."""
    found = sections()
    titles = {section.of: section.title for section in found if section.of}
    lines = [CONFIGURATION_HEAD.rstrip("\n")]
    for section in found:
        lines += ["", f"{'#' * section.level} {section.title}", "", section.says]
        if section.of:
            lines += ["", *table(("key", "type", "default", "meaning"), field_rows(section.of, titles))]
        elif section.title == "Training pairs":
            lines += ["", *table(("key", "type", "default", "meaning"), RECIPE)]
        elif section.title == "Sources":
            lines += _sources()
    return "\n".join(lines) + "\n"


def field_rows(cls: type, titles: dict[type | None, str]) -> Iterable[tuple[str, ...]]:
    """One row per field of a dataclass: key, type, default, meaning."""
    hints, says = typing.get_type_hints(cls), field_docstrings(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name not in says:
            raise SystemExit(f"error: {cls.__name__}.{field.name} has no docstring; write what it means below it")
        made = field.default_factory
        default = made() if callable(made) else field.default
        yield f"`{field.name}`", described(hints[field.name], titles), shown_in_yaml(default), says[field.name]


def field_docstrings(cls: type) -> dict[str, str]:
    """Field -> its docstring (the string below it in the source), including base classes."""
    found: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for node, below in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(below, ast.Expr):
                found[node.target.id] = inspect.cleandoc(ast.literal_eval(below.value))
    return found


def _sources() -> list[str]:
    from search_r3.data.sources.registry import COMMON, SOURCES

    functions = readers()
    for what, given, listed in (("kinds", SOURCES, functions), ("keys of all sources", COMMON, EVERY_SOURCE)):
        if set(given) != set(listed):
            raise SystemExit(f"error: .ci/reference.py lists other {what} than the code: {set(given) ^ set(listed)}")
    head = ("key", "type", "default", "meaning")
    required = {"kind": REQUIRED}
    rows = [(f"`{key}`", WORDS[kind], required.get(key, ""), EVERY_SOURCE[key]) for key, kind in COMMON.items()]
    lines = ["", *table(head, rows)]
    for name, kind in SOURCES.items():
        function = functions[name]
        says, defaults = argument_docstrings(function) | BESIDE, inspect.signature(function).parameters
        if missing := [key for key in kind.keys if key not in says]:
            raise SystemExit(f"error: {function.__name__} explains no {', '.join(missing)}: add it to its Args")
        rows = []
        for key, of in kind.keys.items():
            default = defaults[key].default if key in defaults else None
            has_default = default is not None and default is not inspect.Parameter.empty
            text = REQUIRED if key in kind.needed else shown_in_yaml(default) if has_default else ""
            rows.append((f"`{key}`", WORDS[of], text, says[key]))
        lines += ["", f"#### {name}", "", paragraphs(function.__doc__ or "")[0], "", *table(head, rows)]
    return lines


def argument_docstrings(function: Callable[..., Any]) -> dict[str, str]:
    """Argument -> its description in the section "Args:" of the docstring."""
    text = inspect.cleandoc(function.__doc__ or "")
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.M)
    arguments = textwrap.dedent(section[1]) if section else ""
    found: dict[str, str] = {}
    for names, says in re.findall(r"^(\w[\w, ]*): ((?:.*\n?)(?: +.*\n?)*)", arguments, re.M):
        one = " ".join(says.split())
        found |= {name.strip(): one[:1].upper() + one[1:] for name in names.split(",")}
    return found


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def described(hint: Any, titles: dict[type | None, str]) -> str:
    """A type in words; a dataclass as a link to its section."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if len(members := _members(hint)) > 1:
        return either([described(member, titles) for member in members])
    if origin is Literal:
        return either([f"`{value}`" for value in inside])
    if origin is tuple and Ellipsis not in inside:
        return " and ".join(described(member, titles) for member in inside)
    if origin in (list, tuple):
        return f"list of {plural(described(inside[0], titles))}"
    if origin is dict:
        return f"mapping of {plural(described(inside[0], titles))} to {plural(described(inside[1], titles))}"
    if hint not in titles and dataclasses.is_dataclass(hint):  # one that is not written in YAML
        return f"`{hint.__name__}`"
    return f"[{titles[hint]}](#{slug(titles[hint])})" if hint in titles else WORDS[hint]


def either(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def plural(words: str) -> str:
    return words + "s" if words.endswith(("text", "number", "path")) else words


def shown_in_yaml(value: Any) -> str:
    """A default in YAML; for a section, the keys that differ from the defaults of its class."""
    if value is dataclasses.MISSING:
        return REQUIRED
    if dataclasses.is_dataclass(value):
        own = type(value)()
        changed = {
            field.name: getattr(value, field.name)
            for field in dataclasses.fields(value)
            if getattr(value, field.name) != getattr(own, field.name)
        }
        return ", ".join(f"`{name}: {_yaml(item)}`" for name, item in changed.items())
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_yaml, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def shown(value: Any) -> str:
    """A default of the command line; "" if an option is off or has no value."""
    if value is None or value is False:
        return ""
    return f"`{'on' if value is True else value.value if isinstance(value, Enum) else value}`"


def slug(heading: str) -> str:
    """The anchor of a heading on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


PAGES: dict[str, Callable[[], str]] = {"docs/cli.md": cli_page, "docs/configuration.md": configuration_page}


def main() -> None:
    """Write the pages that differ from the code."""
    for name, make in PAGES.items():
        page, text = ROOT / name, make()
        same = page.is_file() and page.read_text(encoding="utf-8") == text
        if not same:
            page.write_text(text, encoding="utf-8")
        print(f"{name}: {'up to date' if same else 'rewritten'}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
