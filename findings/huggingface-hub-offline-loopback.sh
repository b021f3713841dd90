#!/bin/sh
# huggingface_hub 2.4.0: HF_HUB_OFFLINE=1 also forbids InferenceClient to reach an embedding server on the same machine.
#
# Expected: offline mode concerns the hub, as the variable's name says; a client that is given the address of a server on 127.0.0.1 sends no
# request anywhere else, so the embeddings arrive.
# Seen: without the variable one request arrives, to the address as given (path "/", not "/embed", which text-embeddings-inference documents); with it
# none does, and the client raises OfflineModeIsEnabled, "Cannot reach http://127.0.0.1:...". Machines without the hub set the variable so that
# loading local models does not wait for it, and on these a local embedding server is then out of reach.
#
# In Search-R3: `serve` answers "/" as it does "/embed" (docs/server.md), and our own programs ask no server through this client.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check huggingface_hub==2.4.0 numpy==2.4.6
cat > "$work/run.py" <<'PYTHON'
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from huggingface_hub import InferenceClient

asked = []


class Embeddings(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked.append((self.path, body["inputs"]))
        answer = b"[[0.6, 0.8]]"
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


server = HTTPServer(("127.0.0.1", 0), Embeddings)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = InferenceClient(model=f"http://127.0.0.1:{server.server_port}")
try:
    outcome = str(client.feature_extraction("a text").tolist())
except Exception as error:
    outcome = type(error).__name__
print(asked, outcome)
PYTHON
online=$(env -u HF_HUB_OFFLINE "$work/venv/bin/python" "$work/run.py")
offline=$(HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/run.py")
echo "$online"
echo "$offline"
if [ "$online" = "[('/', 'a text')] [[0.6000000238418579, 0.800000011920929]]" ] && [ "$offline" = "[] OfflineModeIsEnabled" ]; then
    echo "as described"
else
    echo "changed"
    exit 1
fi
