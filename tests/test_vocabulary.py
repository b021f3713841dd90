"""Words that this project once had of its own, where the field has a better one: none of them comes back.

docs/glossary.md lists the few words that are ours. LOG.md and CHANGELOG.md are history and keep theirs.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("search_r3", "docs", "configs", "examples", ".github")
PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")

WORDS = {
    r"dealt": "strided (indices), local (rows)",
    r"everyones|everyone's|everybody's": "all-gathered",
    r"gauges?|gauged": "staleness evaluation",
    r"judge|judging": "score (of qrels it is said that they judge documents)",
    r"mend|mends|mended": "fix",
    r"told in (a|one) line": "reported",
    r"held to the": "tested against",
    r"behind (an|the|its|their) (analysis|analyses|reasoning)": "with reasoning",
    r"anal[y]s(is|es|e|ed|ing)": "reasoning, reasoning trace",
    r"of late": "recent",
    r"whose fault": "",
    r"fruitless": "evaluations without improvement",
    r"workbench": "study context",
    r"put in a row": "serialized",
    r"mess(es)? about": "",
    r"written otherwise": "perturbed",
    r"goes on after": "resumes",
    r"(bits|nats|row|title) a \w+": "per",
    r"what lies between": "elementwise operations",
    r"as people type": "noisy queries",
}
"""A regular expression of whole words -> the field's."""

NAMES = {
    "start_from", "batch_of", "pairs_per_step", "max_analysis_tokens", "reasoning_share", "sample_share",
    "samples_from",
    "gradient_cache", "rows_per_chunk", "group_size", "steps_per_round", "minibatches", "from_rank", "to_rank",
    "rollouts_per_batch", "gauge_every", "gauge_rows", "gauge_queries", "gauge_error", "encode_behind",
    "NOBODY", "Judged", "Sharers", "Workbench", "Spending", "SAYS", "honest_remarks", "read_problem", "Collector",
}  # fmt: skip
"""Identifiers and keys that have another name now."""

EXCEPTIONS = {
    "search_r3/training/config.py",  # these three say what older recipes, runs and pairs call a thing now
    "search_r3/training/run_checkpoint.py",
    "search_r3/data/pairs.py",
    "search_r3/data/sources/beir_pairs.py",  # knows words of abstracts
    "docs/report.html",  # quotes documents of the data sets, and old runs
}


def pages() -> list[Path]:
    """Every file of prose, recipes and code that a user or a contributor reads."""
    found = [ROOT / name for name in PAGES]
    for place in PLACES:
        found += [file for file in (ROOT / place).rglob("*") if file.suffix in {".py", ".md", ".yaml", ".yml", ".html"}]
    return [file for file in found if file.relative_to(ROOT).as_posix() not in EXCEPTIONS]


def prose(file: Path) -> str:
    """What people read of a file: of a program its comments, docstrings and messages; of anything else all of it."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    return "\n".join(token.string for token in tokens if token.type in kinds)


def names(file: Path) -> set[str]:
    """The identifiers of a program, keyword arguments included, or the keys of a recipe."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return set(re.findall(r"^\s*(?:- )?(\w+):", text, re.MULTILINE))
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                found.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
    return found


@pytest.mark.parametrize("word", WORDS)
def test_no_old_word_is_left_in_what_people_read(word: str) -> None:
    pattern = re.compile(rf"\b({word})\b", re.IGNORECASE)
    found = {
        f"{file.relative_to(ROOT)}: {match.group()}" for file in pages() for match in pattern.finditer(prose(file))
    }
    assert not found, f"say {WORDS[word] or 'it plainly'} instead, in " + ", ".join(sorted(found)[:20])


def test_no_old_name_is_left() -> None:
    found = {file.relative_to(ROOT).as_posix(): names(file) & NAMES for file in pages()}
    assert not {file: old for file, old in found.items() if old}


def test_a_word_that_comes_back_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('"""The gauge."""\n# mend it\ndef start_from(gauge): ...\n')
    assert "gauge" in prose(tmp_path / "a.py")
    assert "mend" in prose(tmp_path / "a.py")
    assert names(tmp_path / "a.py") & NAMES == {"start_from"}


def test_the_glossary_is_short() -> None:
    terms = re.findall(r"^\| (?!term|---)", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert 20 <= len(terms) <= 40
