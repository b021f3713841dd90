#!/bin/sh
# langchain-huggingface 1.2.3: HuggingFaceEndpointEmbeddings takes no address of a server, neither as `model` nor as `repo_id`.
#
# Expected: the class is LangChain's client of text-embeddings-inference, which answers at an address of one's own; its "endpoint" is a URL, which
# huggingface_hub's client, on which it stands, takes as the model.
# Seen: both arguments end in a ValidationError that asks for a repo ID, before any request; huggingface_hub 1.33.0 itself, given the same address,
# embeds. So a program that used the class with its own server stops at start-up once the package is upgraded.
#
# In Search-R3: our server is reached through OpenAIEmbeddings of langchain-openai (docs/server.md).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check langchain-huggingface==1.2.3 huggingface_hub==1.33.0 numpy==2.4.6
cat > "$work/run.py" <<'PYTHON'
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from huggingface_hub import InferenceClient
from langchain_huggingface import HuggingFaceEndpointEmbeddings
from pydantic import ValidationError


class Embeddings(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        answer = json.dumps([[0.6, 0.8]]).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


server = HTTPServer(("127.0.0.1", 0), Embeddings)
threading.Thread(target=server.serve_forever, daemon=True).start()
address = f"http://127.0.0.1:{server.server_port}"
print("huggingface_hub:", InferenceClient(model=address).feature_extraction("a text").shape)
for name in ("model", "repo_id"):
    try:
        print(f"{name}:", HuggingFaceEndpointEmbeddings(**{name: address}).embed_query("a text"))
    except ValidationError as error:
        print(f"{name}:", error.errors()[0]["msg"])
PYTHON
found=$(env -u HF_HUB_OFFLINE "$work/venv/bin/python" "$work/run.py")
echo "$found"
if [ "$found" = "huggingface_hub: (1, 2)
model: Value error, \`model\` must be a HuggingFace repo ID, not a URL.
repo_id: Value error, \`repo_id\` must be a HuggingFace repo ID, not a URL." ]; then
    echo "as described"
else
    echo "changed"
    exit 1
fi
