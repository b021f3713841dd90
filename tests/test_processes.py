"""Tests end: a child process ends with the test that started it, and a test that waits for ever fails."""

from __future__ import annotations

import ast
import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from crashed_workers import pytest_xdist_make_scheduler
from processes import run, run_processes, start

SPAWNS_A_STUBBORN_GRANDCHILD = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
print("started", child.pid, flush=True)
time.sleep(1000)
"""


def ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie, within 10 seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


def test_much_output_on_both_streams_fills_no_pipe() -> None:
    script = "import sys; sys.stdout.write('x' * 2_000_000); sys.stderr.write('y' * 2_000_000)"
    done = run([sys.executable, "-c", script])
    assert (done.stdout, done.stderr) == ("x" * 2_000_000, "y" * 2_000_000)


def test_what_is_given_is_read_and_an_error_is_raised_with_the_output() -> None:
    assert run([sys.executable, "-c", "print(input())"], given="fährt".encode()).stdout == "fährt\n"
    failing = [sys.executable, "-c", "import sys; print('so far'); sys.exit('so bad')"]
    assert run(failing, check=False).returncode == 1
    with pytest.raises(AssertionError, match="exit status 1") as raised:
        run(failing)
    assert "so far" in raised.value.__notes__[0]
    assert "so bad" in raised.value.__notes__[0]


def test_a_child_and_what_it_started_end_with_the_block_whatever_fails() -> None:
    started: list[int] = []

    def fail() -> None:
        with start([sys.executable, "-c", SPAWNS_A_STUBBORN_GRANDCHILD]) as child:
            started.extend((child.pid, int(child.line("started").split()[1])))
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose") as raised:
        fail()
    assert all(map(ended, started))
    assert f"started {started[1]}" in raised.value.__notes__[0]


def test_a_line_and_an_end_are_waited_for_with_a_limit() -> None:
    with start([sys.executable, "-c", "import time; print('one', flush=True); time.sleep(1000)"]) as child:
        assert child.line("^o.e$") == "one"
        with pytest.raises(AssertionError, match=r"no line with 'two' on stdout, not within 0\.2 s"):
            child.line("two", seconds=0.2)
        with pytest.raises(AssertionError, match="has not ended within"):
            child.wait(0.2)
    assert child.process.returncode == -signal.SIGTERM
    with start([sys.executable, "-c", "print('one')"]) as child, pytest.raises(AssertionError, match="has ended"):
        child.line("two")


def test_children_end_when_the_tests_are_killed() -> None:
    code = "import processes, sys, time; child = processes.start(['sleep', '1000']); print(child.pid, flush=True)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with start([sys.executable, "-c", f"{code}; time.sleep(1000)"], env=environment) as tests:
        pid = int(tests.line(r"^\d+$"))
        os.kill(tests.pid, signal.SIGKILL)  # it alone; `sleep` is in a group of its own
        assert ended(pid)


def sleep_for_ever(rank: int) -> None:
    time.sleep(1000)


def test_processes_that_work_together_have_a_limit() -> None:
    with pytest.raises(AssertionError, match="have not ended within 0 s"):
        run_processes(sleep_for_ever, seconds=0)


DIES = """
import os, time, pytest

@pytest.mark.parametrize("n", range({tests}))
def test_it(n):
    time.sleep(0.05)
    if n == {dies_at}:
        os._exit(1)
"""


class FakeWorker:
    """A worker of pytest-xdist that only notes what it is given."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.shutting_down = False
        self.given: list[list[int]] = []

    def send_runtest_some(self, tests: list[int]) -> None:
        """Note them."""
        self.given.append(tests)

    def shutdown(self) -> None:
        """It gets nothing more."""
        self.shutting_down = True


@pytest.mark.parametrize("dies_at", [0, 1, 2, 3])
def test_no_worker_gets_a_file_of_which_nothing_is_left(dies_at: int) -> None:
    tests = ["a.py::0", "b.py::0", *(f"{name}.py::{n}" for name in "cde" for n in range(4))]
    options = {"tx": ["popen", "popen"], "dist": "loadfile"}
    config = SimpleNamespace(option=SimpleNamespace(loadscopereorder=False), getvalue=options.get)
    scheduler = pytest_xdist_make_scheduler(config, None)
    workers = [FakeWorker("gw0"), FakeWorker("gw1")]
    for worker in workers:
        scheduler.add_node(worker)
        scheduler.add_node_collection(worker, tests)
    scheduler.schedule()
    assert [worker.given for worker in workers] == [[[0], [2, 3, 4, 5]], [[1], [6, 7, 8, 9]]]
    for n in [1, *range(6, 6 + dies_at)]:
        scheduler.mark_test_complete(workers[1], n)
    assert scheduler.remove_node(workers[1]) == f"d.py::{dies_at}"
    for n in [0, 2, 3, 4, 5, *range(10, 12)]:
        scheduler.mark_test_complete(workers[0], n)
    done = {1, *range(6, 7 + dies_at)}
    assert all(workers[0].given)
    assert sorted(test for some in workers[0].given for test in some) == sorted({*range(len(tests))} - done)


@pytest.mark.slow
@pytest.mark.parametrize("dies_at", [0, 2, 3])
def test_a_run_ends_when_a_worker_has_died(tmp_path: Path, dies_at: int) -> None:
    for name in "abcd":
        (tmp_path / f"test_{name}.py").write_text(DIES.format(tests=4, dies_at=-1))
    (tmp_path / "test_z.py").write_text(DIES.format(tests=4, dies_at=dies_at))
    plugins = ["-p", "xdist", "-p", "crashed_workers", "-p", "no:cacheprovider", "-n", "2"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "--dist", "loadfile", "--no-loadscope-reorder"]
    # Not all plugins that are installed: importing them takes seconds, and four processes do.
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = run([*command, str(tmp_path)], env=environment, cwd=tmp_path, check=False, seconds=120)
    assert done.returncode == 1
    assert "1 failed, 19 passed" in done.stdout
    assert f"crashed while running 'test_z.py::test_it[{dies_at}]'" in done.stdout


WITHOUT_A_LIMIT = {"join", "wait", "result", "get", "communicate"}  # when called without arguments
WITH_A_TIMEOUT = {"urlopen", "create_connection", "HTTPConnection", "HTTPSConnection", "OpenAI"}
IN_PROCESSES_ALONE = {"Popen", "spawn", "check_output", "check_call", "getoutput", "forkpty", "system"}


def faults(source: str) -> list[str]:
    """The calls in `source` that may wait for ever, or start a process that nobody ends."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute | ast.Name):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
        given = {keyword.arg for keyword in call.keywords}
        wrong = {
            "waits without a limit": name in WITHOUT_A_LIMIT and not call.args and not given,
            "has no timeout": name in WITH_A_TIMEOUT and "timeout" not in given,
            "keeps Python from ending": name == "Thread" and "daemon" not in given,
            "use processes.run or start": name in IN_PROCESSES_ALONE or ast.unparse(call.func) == "subprocess.run",
        }
        found += [f"{call.lineno}: {ast.unparse(call)[:100]}: {why}" for why, it_does in wrong.items() if it_does]
    return found


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("thread.join()", "waits without a limit"),
        ("event.wait()", "waits without a limit"),
        ("', '.join(names), thread.join(5), pool.submit(f).result(timeout=9)", None),
        ("urllib.request.urlopen(url)", "has no timeout"),
        ("socket.create_connection(address, timeout=5)", None),
        ("threading.Thread(target=print).start()", "keeps Python from ending"),
        ("subprocess.run(['ls'], timeout=5)", "use processes.run"),
        ("with subprocess.Popen(['ls']) as child: pass", "use processes.run"),
        ("mp.spawn(work)", "use processes.run"),
    ],
)
def test_a_wait_without_a_limit_is_found(source: str, words: str | None) -> None:
    found = faults(source)
    assert len(found) == (words is not None)
    assert not found or words in found[0]


def test_no_test_waits_without_a_limit() -> None:
    folder = Path(__file__).parent
    files = [path for path in sorted(folder.rglob("*.py")) if path.name != "processes.py"]
    assert len(files) > 100
    found = {path.relative_to(folder): wrong for path in files if (wrong := faults(path.read_text(encoding="utf-8")))}
    assert found == {}


WAITS = {
    "python": "import threading\ndef test_it():\n    threading.Lock().acquire() and threading.Event().wait()",
    "library": """
import ast
import ctypes
def test_it():
    mutex, locked = ctypes.create_string_buffer(64), ctypes.PyDLL(None).pthread_mutex_lock
    locked(mutex), locked(mutex)  # holds the interpreter's own lock too
""",
}


@pytest.mark.parametrize("where", WAITS)
def test_a_test_that_waits_for_ever_fails(where: str, tmp_path: Path) -> None:
    if where == "library" and not hasattr(ctypes.CDLL(None), "pthread_mutex_lock"):
        pytest.skip("no pthreads")
    (tmp_path / "test_waits.py").write_text(WAITS[where])
    limits = ["-o", "timeout=1", "-o", "faulthandler_timeout=3", "--rootdir", tmp_path, "-p", "no:cacheprovider"]
    settings = ["-c", Path(__file__).parents[1] / "pyproject.toml"]
    done = run([sys.executable, "-m", "pytest", *settings, *limits, tmp_path], check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "test_waits.py" in done.stdout + done.stderr
    assert ("Timeout (>1.0s)" in done.stdout) == (where == "python")
