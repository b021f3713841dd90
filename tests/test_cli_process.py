"""What the command line says to the process before torch is loaded."""

from __future__ import annotations

import os
import sys

import pytest
from processes import run

PROGRAM = """
import os, sys
from search_r3.cli import main
main([*sys.argv[1:], "no-such-place"])
print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        (["serve", "--engine", "int8"], None, "PASSIVE"),
        (["serve", "--engine", "int8"], "ACTIVE", "ACTIVE"),
        (["serve", "--engine", "torch"], None, "None"),
        (["search", "--mode", "text", "no-such-index"], None, "PASSIVE"),
        (["search", "--mode", "text", "no-such-index"], "ACTIVE", "ACTIVE"),
    ],
)
def test_idle_threads_sleep_in_a_search_and_beside_the_int8_engine_unless_the_user_has_said_what_they_do(
    arguments: list[str], given: str | None, expected: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    done = run([sys.executable, "-c", PROGRAM, *arguments], env=environment, check=False)
    assert done.stdout.split() == [expected, "False"]
