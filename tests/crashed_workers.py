"""A pytest plugin: the run goes on, and ends, after one of pytest-xdist's workers has died.

xdist 3.8 puts all files of a dead worker back into its queue, with those that were done and the test that killed it,
and at once hands the first of them to a worker that has little left. A worker that gets a file of which nothing is left
never answers, so the run would not end; and the test that killed one worker would go on to kill the next.
"""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling


class FileScheduling(LoadFileScheduling):
    """As `--dist loadfile`, but of a dead worker's files only what is left goes back into the queue."""

    def remove_node(self, node: Any) -> str | None:
        """Take a worker out; the test that it ran, which is reported as failed, or None if it had none left."""
        files = self.assigned_work[node]
        crashed = next((test for tests in files.values() for test, done in tests.items() if not done), None)
        for name, tests in list(files.items()):
            if crashed in tests:
                tests[crashed] = True
            if all(tests.values()):
                del files[name]
        super().remove_node(node)
        return crashed


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling | None:
    """The scheduler above in place of `--dist loadfile`."""
    return FileScheduling(config, log) if config.getvalue("dist") == "loadfile" else None
