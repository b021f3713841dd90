"""A pytest plugin: the run goes on, and ends, after one of pytest-xdist's workers has died.

xdist 3.8 puts all files of a dead worker back into its queue, with those that were done and the test that killed it. A
worker that gets a file of which nothing is left never answers, so the run would not end; and the test that killed one
worker would go on to kill the next.
"""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, sched: Any) -> None:
    """Take `crashitem`, which is reported as failed, and the files that are done out of the queue."""
    queue: dict[str, dict[str, bool]] = sched.workqueue
    for name, tests in list(queue.items()):
        if crashitem in tests:
            tests[crashitem] = True
        if all(tests.values()):
            del queue[name]
