"""As much of Google Cloud Storage's XML API as object_store's client asks of it, for tests without a network.

Objects are told apart by their generation, which a conditional write must name: Google knows no other condition.
(https://cloud.google.com/storage/docs/xml-api/reference-headers#xgoogifgenerationmatch)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: dict[str, tuple[int, bytes]]
    lock: threading.Lock

    def do_GET(self) -> None:
        self._answer(*((200, *self.objects[self.path]) if self.path in self.objects else (404, 0, b"NoSuchKey")))

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        asked = self.headers["x-goog-if-generation-match"]
        with self.lock:
            held = self.objects.get(self.path, (0, b""))[0]
            if asked is not None and int(asked) != held:
                self._answer(412, 0, b"PreconditionFailed")
                return
            self.objects[self.path] = held + 1, content
            self._answer(200, held + 1, b"")

    def do_DELETE(self) -> None:
        self.objects.pop(self.path, None)
        self._answer(204, 0, b"")

    def _answer(self, status: int, generation: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.send_header("ETag", '"the same for equal contents"')
        self.send_header("x-goog-generation", str(generation))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def google_storage() -> Iterator[dict[str, str]]:
    """Yields the storage options with which a client finds the server."""
    handler = type("Handler", (_Handler,), {"objects": {}, "lock": threading.Lock()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    key = {
        "gcs_base_url": f"http://127.0.0.1:{server.server_port}",
        "disable_oauth": True,
        "client_email": "",
        "private_key": "",
        "private_key_id": "",
    }
    try:
        yield {"google_service_account_key": json.dumps(key), "allow_http": "true"}
    finally:
        server.shutdown()
        server.server_close()
