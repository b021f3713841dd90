"""A local address in front of an S3 server that behaves as storage does on a bad day, from one request to the next."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["none", "silent", "half", "403", "500", "503", "gone"]
HALF = b"HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\nContent-Length: 5000\r\n\r\n<?xml version"


class FaultyStorage:
    """What `storage(...)` gives.

    Attributes:
        url: the address.
        fault: "none" passes requests on; "silent" takes them and never answers; "half" stops in the middle of an
            answer; "403" (wrong keys), "500" and "503" are answers; "gone" ends every connection.
        delay: seconds that each request waits before it is passed on.
        after: the fault begins after this many more requests.
        requests: the first lines of those that came.
        spans: when each of them came, and when the last part of its answer was passed on (seconds since 1970; 0.0 if
            there was none).
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname or "", parts.port or 0)
        self.fault: Fault = "none"
        self.after = 0
        self.delay = 0.0
        self.requests: list[str] = []
        self.spans: list[list[float]] = []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        self.sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for one in [self.server, *self.sockets]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.server.accept()
                self.sockets.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        upstream: socket.socket | None = None
        current: list[list[float]] = []  # the span of the request that is being answered
        with suppress(OSError):
            while data := client.recv(1 << 16):
                first = data.split(b"\r\n")[0].decode("latin-1")
                if first.endswith("HTTP/1.1"):
                    current[:] = [[time.time(), 0.0]]
                    self.spans += current
                    self.requests.append(first)
                    self.after -= 1
                if self.fault == "none" or self.after >= 0:
                    time.sleep(self.delay)
                    if upstream is None:
                        upstream = socket.create_connection(self.upstream, timeout=120)
                        self.sockets.append(upstream)
                        threading.Thread(target=_pump, args=(upstream, client, current), daemon=True).start()
                    upstream.sendall(data)
                elif self.fault == "gone":
                    client.shutdown(socket.SHUT_RDWR)
                elif self.fault == "half":
                    client.sendall(HALF)
                elif self.fault != "silent":
                    client.sendall(f"HTTP/1.1 {self.fault} Bad day\r\nContent-Length: 4\r\n\r\nsick".encode())
        for one in (client, upstream):  # thousands of them would be too many open files
            if one is not None:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
                self.sockets.remove(one)


def _pump(source: socket.socket, target: socket.socket, current: list[list[float]]) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            for span in current:
                span[1] = time.time()
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)


@contextmanager
def s3_bucket() -> Iterator[str]:
    """The address of a local server that speaks S3 (moto's), with one bucket, called "bucket"."""
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        signed = {"Authorization": "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"}
        request = urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT", headers=signed)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 200
        yield f"http://{host}:{port}"
    finally:
        running.stop()


def s3_variables(url: str) -> dict[str, str]:
    """The usual environment variables, for that server or an address in front of it."""
    return {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def storage(upstream: str) -> Iterator[FaultyStorage]:
    """A `FaultyStorage` in front of `upstream`."""
    found = FaultyStorage(upstream)
    try:
        yield found
    finally:
        found.close()
