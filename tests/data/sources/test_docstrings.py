"""Functions out of source trees: parsed and never run, without copies, and the same on every run."""

from __future__ import annotations

import sys

import pytest

from search_r3.data.sources.docstrings import docstring_pairs, find_package, fingerprint, read_functions
from search_r3.errors import InputError

SOURCE = '''
import os
raise SystemExit("importing this would end the test")

def read_lines(path, encoding="utf-8"):
    """Return the lines of a text file.

    Parameters
    ----------
    path : str
    """
    # a comment
    with open(path, encoding=encoding) as handle:
        lines = handle.readlines()
    return lines

class Box:
    @property
    def size(self):
        """Compute the number of things in the box.

        >>> Box().size
        """
        total = len(self.things)
        total += len(self.others)
        return total

    def __repr__(self):
        """Return the representation of a box."""
        a = 1
        b = 2
        return "Box"

    def undocumented(self):
        a = 1
        return a

def one_line(x):
    """Return the square of a number."""
    return x * x
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "toybox"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text(SOURCE, encoding="utf-8")
    (folder / "broken.py").write_text("def f(:\n", encoding="utf-8")
    (folder / "tests" / "more.py").write_text(SOURCE.replace("read_lines", "other"), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def by_name(folder):
    return {function.id: function for function in read_functions(folder, "toybox")}


def test_documented_functions_are_found_and_tests_and_broken_files_are_passed_over(package):
    assert set(by_name(package)) == {"toybox.read_lines", "toybox.Box.size", "toybox.Box.__repr__", "toybox.one_line"}


def test_code_has_no_docstring_and_is_dedented_and_still_parses(package):
    function = by_name(package)["toybox.Box.size"]
    assert function.code == (
        "def size(self):\n    total = len(self.things)\n    total += len(self.others)\n    return total"
    )
    assert "Compute the number of things" in function.documented
    compile(function.documented, "documented", "exec")
    assert by_name(package)["toybox.read_lines"].body_lines == 3


def test_a_long_docstring_is_shortened_at_a_paragraph_and_closed_again(package):
    long = "\n\n".join([f"    Paragraph {i} " + "word " * 30 for i in range(9)])
    text = f'def f(x):\n    """Do a thing.\n\n{long}\n    """\n    x += 1\n    return x\n'
    (package / "long.py").write_text(text, encoding="utf-8")
    documented = by_name(package)["toybox.long.f"].documented
    assert "Paragraph 0" in documented
    assert "Paragraph 5" not in documented
    assert documented.endswith("return x")
    compile(documented, "documented", "exec")


def test_a_shortened_docstring_does_not_end_with_a_bare_heading(package):
    rows = "\n".join(f"    p{i} : int, one of many parameters" for i in range(12))
    docstring = f'"""Do a thing.\n\n    Parameters\n    ----------\n\n{rows}\n    """'
    text = f"def f(x):\n    {docstring}\n    x += 1\n    return x\n"
    (package / "long.py").write_text(text, encoding="utf-8")
    documented = by_name(package)["toybox.long.f"].documented
    assert documented == 'def f(x):\n    """Do a thing.\n    """\n    x += 1\n    return x'


def test_pairs_are_made_without_importing_the_package(package):
    pairs, dropped = docstring_pairs(["toybox"], web_share=0.0, name_share=0.0, documented_share=0.0)
    assert [(pair.id, pair.query) for pair in pairs] == [
        ("toybox.read_lines", "Return the lines of a text file."),
        ("toybox.Box.size", "Compute the number of things in the box."),
    ]
    assert all('"""' not in pair.positive for pair in pairs)
    assert pairs[0].source == "docstrings:toybox"
    assert dropped == {"trivial name": 1, "short body": 1, "file that does not parse": 1}
    assert "toybox" not in sys.modules


def test_the_same_seed_gives_the_same_pairs_and_the_shares_are_kept():
    first, _ = docstring_pairs(["json"], seed=3, min_body_lines=1)
    again, _ = docstring_pairs(["json"], seed=3, min_body_lines=1)
    assert first == again
    assert first
    kept, _ = docstring_pairs(["json"], documented_share=1.0, min_body_lines=1)
    assert all('"""' in pair.positive for pair in kept)


def test_copies_are_dropped_and_an_excluded_corpus_is_left_out(package):
    (package / "copy.py").write_text(SOURCE.replace("lines of a text", "rows of some"), encoding="utf-8")
    pairs, dropped = docstring_pairs(["toybox"], web_share=0.0, name_share=0.0)
    assert len(pairs) == 2
    assert dropped["duplicate function"] == 2
    held = 'def read_lines(path, encoding="utf-8"):\n  "Else."\n  with open(path, encoding=encoding) as handle:\n'
    held += "      lines = handle.readlines()\n  return lines"
    pairs, dropped = docstring_pairs(["toybox"], excluded=[held])
    assert "toybox.read_lines" not in {pair.id for pair in pairs}
    assert dropped["excluded corpus"] == 2


def test_positives_are_cut_at_a_line_end(package):
    pairs, _ = docstring_pairs(["toybox"], max_chars=80, documented_share=0.0)
    assert all(len(pair.positive) <= 80 for pair in pairs)
    assert pairs[0].positive.endswith("as handle:") or pairs[0].positive.endswith("a comment")


def test_python_2_code_has_a_fingerprint_too():
    assert fingerprint('def f():\n    """Doc."""\n    print "a"') == fingerprint('def f():\n    print   "a"')


def test_packages_that_are_not_there_are_named():
    with pytest.raises(InputError, match='"no_such_package_here" is not installed'):
        find_package("no_such_package_here")
    with pytest.raises(InputError, match="top-level"):
        find_package("os.path")
    assert (find_package("stdlib") / "json").is_dir()
