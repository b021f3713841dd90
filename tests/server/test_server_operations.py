"""What a platform team does to a server: probes, signals, restarts, prefixes, unix sockets and the ids of requests."""

from __future__ import annotations

import http.client
import json
import logging
import shlex
import shutil
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from processes import run, start
from serving_tools import Answer, Held, Running, eventually, running

from search_r3.cli import main
from search_r3.cli.commands import app
from search_r3.errors import InputError
from search_r3.server.listening import listen, listen_unix
from search_r3.server.logs import LOGGER
from search_r3.server.request_identity import RequestIdentity
from search_r3.server.run_server import make_server
from search_r3.server.server_config import ServerConfig
from search_r3.server.service import Loaded
from search_r3.server.settings_file import read_settings

UNIT = Path(__file__).parents[2] / "examples" / "deployment" / "search-r3@.service"
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def ask_unix(path: Path, method: str, route: str, body: Any = None, key: str = "") -> Answer:
    """One request on a connection of its own to a unix socket."""
    connection = http.client.HTTPConnection("localhost", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        connection.request(method, route, json.dumps(body) if body is not None else None, headers)
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.mark.slow
def test_a_process_reloads_on_hup_and_leaves_gently_on_term(tiny_model: Path, tmp_path: Path) -> None:
    """Over a unix socket: keys and settings change at SIGHUP and a bad file changes nothing; SIGTERM makes it unready,
    requests are answered for the length of the pause, and the exit code is 0."""
    keys, settings, at = tmp_path / "keys", tmp_path / "settings.yaml", tmp_path / "s"
    keys.write_text("old\n")
    settings.write_text("max_items: 2\npause: 3\n")
    options = ["--uds", str(at), "--settings", str(settings), "--api-key-file", str(keys)]
    command = [sys.executable, "-m", "search_r3", "serve", "--model", str(tiny_model), "--device", "cpu", *options]

    def embed(key: str, texts: int = 1) -> Answer:
        body = {"model": "tiny-llama-base", "input": ["hello"] * texts}
        return ask_unix(at, "POST", "/v1/embeddings", body, key)

    with start(command, cwd=tmp_path) as process:
        assert "http+unix://" in json.loads(process.line('"listening"', "stderr"))["url"]
        process.line('"ready"', "stderr")
        assert ask_unix(at, "GET", "/readyz").status == 200
        assert [embed("old", 2).status, embed("new").status, embed("old", 3).status] == [200, 401, 400]

        keys.write_text("new\n")
        settings.write_text("max_items: 3\npause: 3\n")
        process.send_signal(signal.SIGHUP)
        line = json.loads(process.line("settings read again", "stderr"))
        assert (line["changed"], line["keys"]) == (["api_keys", "max_items"], 1)
        assert [embed("new", 3).status, embed("old").status, embed("new", 4).status] == [200, 401, 400]

        settings.write_text("max_itms: 4\n")
        process.send_signal(signal.SIGHUP)
        refused = json.loads(process.line("settings refused", "stderr"))
        assert "max_items" in refused["reason"]
        assert [embed("new", 3).status, embed("new", 4).status] == [200, 400]

        process.send_signal(signal.SIGTERM)
        eventually(lambda: ask_unix(at, "GET", "/readyz").status == 503, 2)
        ready = ask_unix(at, "GET", "/readyz", key="new")
        assert (ready.json["status"], ready.json["reason"]) == ("terminating", "the server is about to shut down")
        answer = embed("new")
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert ask_unix(at, "GET", "/livez").status == 200
        assert process.wait(60) == 0
    assert not at.exists()
    lines = [json.loads(line) for line in process.stderr.splitlines() if line.startswith("{")]
    assert lines[-1]["event"].startswith("Finished server process")
    assert "hello" not in process.stderr


def test_requests_that_the_grace_period_cuts_off_are_told_apart_from_a_clean_end(held: Held) -> None:
    with running(lambda: Loaded.of(held), grace=0.5) as server:  # type: ignore[arg-type]
        held.armed = True
        connection = server.open_embed(["one"])
        eventually(lambda: bool(held.passes))
        server.server.handle_exit(signal.SIGTERM, None)
        answer = connection.recv(10_000)
        connection.close()
        held.gate.set()
        server.thread.join(30)
    assert answer.startswith(b"HTTP/1.1 503")
    assert server.service.dropped


def test_a_second_signal_ends_the_pause(tiny) -> None:
    with running(lambda: Loaded.of(tiny), pause=600.0) as server:
        server.server.handle_exit(signal.SIGTERM, None)
        assert server.ask("GET", "/health").json["status"] == "terminating"
        assert server.embed("still answered").status == 200
        server.stop()
    assert not server.service.dropped


def test_ctrl_c_does_not_pause(tiny) -> None:
    with running(lambda: Loaded.of(tiny), pause=600.0) as server:
        server.server.handle_exit(signal.SIGINT, None)
        server.thread.join(30)
        assert not server.thread.is_alive()


def test_a_reload_changes_the_limits_of_a_running_server(tiny) -> None:
    now = {"config": ServerConfig(max_items=2)}
    server = make_server(now["config"], lambda: Loaded.of(tiny), lambda: now["config"])
    bound = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound.socket]}, daemon=True)
    thread.start()
    found = Running(server, thread, bound.socket.getsockname()[1])
    try:
        eventually(lambda: found.service.status == "ready")
        assert found.embed(["a"] * 3).status == 400
        now["config"] = ServerConfig(max_items=3, grace=7.0, api_keys=("secret",))
        server.ask_reload()
        eventually(lambda: found.embed(["a"]).status == 401)
        assert found.service.config.max_items == 3
        assert server.config.timeout_graceful_shutdown == 7
        assert found.ask("GET", "/openapi.json").json["components"]["schemas"]["Texts"]["maxItems"] == 3
    finally:
        found.stop()


def test_the_settings_file_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("budget: 8\ntimeout: 20\nqueue:\n")
    assert read_settings(file) == {"reasoning_tokens": 8, "timeout": 20.0}
    with pytest.raises(InputError, match=r"timeout is also given as --timeout; remove one of them"):
        read_settings(file, {"timeout", "host"})
    file.write_text("cache: 3\n")
    with pytest.raises(InputError, match="cache"):
        read_settings(file)
    with pytest.raises(InputError, match="none"):
        read_settings(tmp_path / "none")


# ---------------------------------------------------------------------------------------------------- unix sockets


def test_a_unix_socket_that_a_killed_server_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = listen_unix(path)
    with pytest.raises(InputError, match=r"another server is listening there; choose another --uds"):
        listen_unix(path)
    first.socket.close()  # its file stays, as after SIGKILL
    second = listen_unix(path)
    assert connects(path)
    assert stat.S_ISSOCK(path.stat().st_mode)
    second.close()
    assert not path.exists()


def test_a_server_does_not_remove_the_socket_of_its_successor(tmp_path: Path) -> None:
    first = listen_unix(tmp_path / "s")
    (tmp_path / "s").unlink()
    second = listen_unix(tmp_path / "s")
    first.close()
    assert connects(tmp_path / "s")
    second.close()


def test_a_unix_socket_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for path, words in [
        (tmp_path / "file", "it is not a socket"),
        (tmp_path / "missing" / "s", "No such file or directory"),
        (tmp_path / ("long" * 40), "too long"),
    ]:
        with pytest.raises(InputError, match=words):
            listen_unix(path)
    assert (tmp_path / "file").read_text() == "precious"


def test_options_that_contradict_each_other_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "settings.yaml").write_text("queue: 7\n")
    for arguments, words in [
        (["--uds", str(tmp_path / "s"), "--port", "1"], "--uds replaces --host and --port"),
        (["--settings", str(tmp_path / "settings.yaml"), "--queue", "8"], "queue is also given as --queue"),
        (["--root-path", "search"], "root_path is 'search'"),
    ]:
        assert main(["serve", *arguments]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert words in error[0]


# -------------------------------------------------------------------------------------------------------- a prefix


@pytest.fixture(scope="module")
def below(tiny, make_index) -> Iterator[Running]:
    index = make_index()
    with running(lambda: Loaded.of(tiny, index), root_path="/team/search") as found:
        yield found


@pytest.mark.parametrize("prefix", ["", "/team/search"], ids=["the proxy removes it", "the proxy leaves it"])
def test_below_a_prefix_whether_or_not_the_proxy_removes_it(below: Running, prefix: str) -> None:
    body = {"query": "train", "mode": "text", "reasoning": False}
    assert below.post(f"{prefix}/v1/search", body).json["hits"]
    assert below.ask("GET", f"{prefix}/readyz").status == 200
    assert b"page.js" in below.ask("GET", f"{prefix}/").body
    assert below.ask("GET", f"{prefix}/page.js").status == 200
    assert below.ask("GET", f"{prefix}/nothing").error["code"] == "not_found"
    assert below.ask("DELETE", f"{prefix}/v1/search").headers["allow"] == "POST"
    assert below.ask("GET", f"{prefix}/openapi.json").json["servers"] == [{"url": "/team/search"}]
    docs = below.ask("GET", f"{prefix}/docs", headers={"Host": "example.org"}).body.decode()
    assert "curl http://example.org/team/search/v1/search" in docs


def test_the_page_without_its_slash_is_redirected(below: Running) -> None:
    answer = below.ask("GET", "/team/search?q=trains%20to%20Vienna")
    assert (answer.status, answer.headers["location"]) == (308, "/team/search/?q=trains%20to%20Vienna")


def test_metrics_name_routes_without_the_prefix(below: Running) -> None:
    below.ask("GET", "/team/search/livez")
    assert 'route="/livez"' in below.ask("GET", "/metrics").body.decode()
    assert "/team" not in below.ask("GET", "/metrics").body.decode()


# ----------------------------------------------------------------------------------------------- ids of requests


def identity(**headers: str) -> RequestIdentity:
    return RequestIdentity.of([(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()])


def test_ids_are_taken_over_into_the_answer_and_the_log(served: Running, caplog: pytest.LogCaptureFixture) -> None:
    headers = {"X-Request-ID": "req-7/a", "traceparent": f"00-{TRACE}-{SPAN}-01"}
    with caplog.at_level(logging.INFO, LOGGER):
        answer = served.ask("GET", "/livez", headers=headers)
        assert answer.headers["x-request-id"] == "req-7/a"
        eventually(lambda: any(getattr(r, "fields", {}).get("id") == "req-7/a" for r in caplog.records))
    line = next(r.fields for r in caplog.records if getattr(r, "fields", {}).get("id") == "req-7/a")  # type: ignore[attr-defined]
    assert (line["trace_id"], line["parent_id"]) == (TRACE, SPAN)
    assert "trace_id" not in identity().fields()


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "line\rbreak", '{"json"}', "é"])
def test_an_unusable_id_is_replaced(given: str) -> None:
    assert identity(x_request_id=given).id != given
    assert len(identity(x_request_id=given).id) == 16
    twice = [(b"x-request-id", b"one"), (b"x-request-id", b"two")]
    assert RequestIdentity.of(twice).id not in ("one", "two")


@pytest.mark.parametrize(
    ("header", "taken"),
    [
        (f"00-{TRACE}-{SPAN}-00", True),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", True),
        (f"cc-{TRACE}-{SPAN}-01.x", False),
        (f"00-{TRACE}-{SPAN}-01-more", False),
        (f"ff-{TRACE}-{SPAN}-01", False),
        (f"00-{TRACE.upper()}-{SPAN}-01", False),
        (f"00-{'0' * 32}-{SPAN}-01", False),
        (f"00-{TRACE}-{'0' * 16}-01", False),
        (f"00-{TRACE}-{SPAN}", False),
        ("", False),
    ],
)
def test_a_traceparent_is_read_as_the_standard_says(header: str, taken: bool) -> None:
    found = identity(traceparent=header)
    assert (found.trace, found.span) == ((TRACE, SPAN) if taken else (None, None))


# ------------------------------------------------------------------------------------------------ a rolling restart


class Proxy:
    """A load balancer as small as one can be: it asks every 20 ms who is ready, and gives each request to the next of
    these, once: it repeats nothing, so every failure is seen."""

    def __init__(self, ports: list[int]) -> None:
        self.ports, self.ready, self.turn = ports, set[int](), 0
        self.ended = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, answer = proxy.forward(self.path, body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        for work in (self.server.serve_forever, self.watch):
            threading.Thread(target=work, daemon=True).start()

    @property
    def port(self) -> int:
        return self.server.server_address[1]

    def forward(self, path: str, body: bytes) -> tuple[int, bytes]:
        usable = sorted(self.ready)
        if not usable:
            return 502, b"none is ready"
        self.turn += 1
        connection = http.client.HTTPConnection("127.0.0.1", usable[self.turn % len(usable)], timeout=30)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        except OSError as error:
            return 502, repr(error).encode()
        finally:
            connection.close()

    def watch(self) -> None:
        while not self.ended.wait(0.02):
            self.ready = {port for port in self.ports if _is_ready(port)}

    def close(self) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextmanager
def load_on(port: int, clients: int = 3) -> Iterator[Callable[[], list[tuple[int, bytes]]]]:
    """Clients that ask without a break; yields what they have been answered so far: (status, body)."""
    ended, answers = threading.Event(), list[tuple[int, bytes]]()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        number = 0
        while not ended.is_set():
            number += 1
            body = json.dumps({"query": f"train {number}", "mode": "hybrid", "reasoning": 2})
            connection.request("POST", "/v1/search", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answers.append((response.status, response.read()))
        connection.close()

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield lambda: list(answers)
    finally:
        ended.set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()


def searches_of(server: Running) -> int:
    """How many searches a server has answered with 200."""
    (metric,) = server.service.metrics.requests.collect()
    counted = [s for s in metric.samples if s.name.endswith("_total") and {"/v1/search", "200"} <= {*s.labels.values()}]
    return int(sum(sample.value for sample in counted))


@pytest.mark.slow
def test_a_rolling_restart_fails_no_request(tiny, make_index) -> None:
    """Two servers behind a proxy are replaced one after the other under load."""
    index = make_index()
    settings: dict[str, Any] = {"pause": 0.6, "grace": 30.0}

    def begin(stack: ExitStack, port: int) -> Running:
        server = make_server(ServerConfig(**settings), lambda: Loaded.of(tiny, index))
        bound = listen("127.0.0.1", port)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound.socket]}, daemon=True)
        thread.start()
        found = Running(server, thread, bound.socket.getsockname()[1])
        stack.callback(found.stop)
        eventually(lambda: _is_ready(found.port))
        return found

    with ExitStack() as stack:
        servers = [begin(stack, 0), begin(stack, 0)]
        proxy = Proxy([server.port for server in servers])
        stack.callback(proxy.close)
        eventually(lambda: len(proxy.ready) == 2)
        with load_on(proxy.port) as answered:
            for server in list(servers):
                eventually(lambda server=server: searches_of(server) > 3)
                server.server.handle_exit(signal.SIGTERM, None)
                server.thread.join(60)
                assert not server.thread.is_alive()
                assert not server.service.dropped
                servers.append(begin(stack, server.port))
                eventually(lambda: len(proxy.ready) == 2)
            for server in servers[2:]:
                eventually(lambda server=server: searches_of(server) > 3)
            answers = answered()
    assert {status for status, _ in answers} == {200}, [a for a in answers if a[0] != 200][:3]


# ---------------------------------------------------------------------------------------------------------- systemd


def test_the_systemd_unit_starts_a_server_as_it_is_now() -> None:
    """Every option of its command exists, and the server may be asked where it says."""
    unit = UNIT.read_text().replace("\\\n", " ")
    settings = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and line[0] not in "#[")
    program, command, *arguments = shlex.split(settings["ExecStart"])
    assert (Path(program).name, command) == ("search-r3", "serve")
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    context = serve.make_context("serve", arguments, resilient_parsing=True)
    assert context.params["uds"] == Path("/run/search-r3/%i.sock")
    assert context.params["pause"] + context.params["grace"] < float(settings["TimeoutStopSec"])
    assert f"--unix-socket {context.params['uds']}" in settings["ExecStartPost"]


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("no systemd here")
    unit = tmp_path / "search-r3@.service"
    unit.write_text(UNIT.read_text().replace("/opt/search-r3/bin/search-r3", "/bin/true"))
    done = run([analyze, "verify", "--man=no", unit], check=False)
    assert "search-r3@" not in done.stderr, done.stderr
