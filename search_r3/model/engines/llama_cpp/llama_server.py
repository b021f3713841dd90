"""llama.cpp's own server inside this process (package xllamacpp), asked by token ids: embeddings and continuations.

The server schedules its requests itself, several sequences a pass, whoever sends them. It listens on a port of the
loopback interface whatever one wants, so it gets a key that only this process knows.
"""

from __future__ import annotations

import base64
import http.client
import json
import secrets
import urllib.parse
import weakref
from collections.abc import Container, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from search_r3.errors import InputError
from search_r3.optional import require

TOKENS_A_PASS = 512
"""Tokens of a pass, of all sequences together. The server keeps the logits of each of them while it embeds."""
SILENT = -1
"""The verbosity at which llama.cpp writes nothing."""


def import_xllamacpp() -> Any:
    """The package xllamacpp.

    Raises:
        InputError: it is not installed, or this build does not run on this processor.
    """
    import torch

    xllamacpp = require("xllamacpp", "llama-cpp", "engine llama.cpp")
    features = xllamacpp.get_system_info()
    if "AVX2 = 1" in features and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        raise InputError("this build of llama.cpp needs AVX2, which this processor lacks; use engine torch")
    if "AMX_INT8 = 1" in features:
        raise InputError(
            "this build of llama.cpp has AMX switched on, with which it ends the process; install the wheel of "
            "xllamacpp from PyPI, which has not, or use engine int8"
        )
    return xllamacpp


class LlamaServer:
    """A GGUF file that llama.cpp serves in this process. Methods can be called from any thread.

    Args:
        path: the GGUF file.
        sequences: how many are processed at once.
        context: the longest sequence in tokens.
        threads: of a pass.

    Raises:
        InputError: the package is missing, or llama.cpp cannot read the file.
    """

    def __init__(self, path: Path, *, sequences: int, context: int, threads: int) -> None:
        xllamacpp = import_xllamacpp()
        self.context, self._key = context, secrets.token_urlsafe(32)
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.embedding = True
        settings.n_parallel, settings.n_ctx = sequences, sequences * context
        settings.n_batch = settings.n_ubatch = min(TOKENS_A_PASS, context)
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.verbosity = SILENT
        settings.warmup = False
        settings.api_keys = [self._key]
        settings.hostnames, settings.port = ["127.0.0.1"], 0
        settings.ui = settings.endpoint_slots = settings.endpoint_props = False
        settings.cache_ram_mib = 0  # otherwise it keeps the caches of old prompts, up to 8 GiB
        settings.cache_idle_slots = False
        try:
            server = xllamacpp.Server(settings)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"llama.cpp cannot run {path} ({error}); export it again, or use engine torch") from error
        self._address = urllib.parse.urlsplit(server.listening_address)
        held = [server]
        self._end = weakref.finalize(self, held.clear)  # its threads must end before the interpreter does
        del server
        self.embed([[0]])  # one that ends before its loop has begun would never end

    def embed(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """The unit state at the last token of each row of token ids, float32 (len(rows), dimension).

        Raises:
            InputError: llama.cpp rejects a row, such as one longer than the context.
        """
        wanted = {"input": [list(row) for row in rows], "encoding_format": "base64"}
        with self._post("/v1/embeddings", wanted) as response:
            record = _checked(response)
        found = sorted(record["data"], key=lambda one: one["index"])
        states = np.stack([np.frombuffer(base64.b64decode(one["embedding"]), dtype="<f4") for one in found])
        norms = np.linalg.norm(states, axis=1, keepdims=True)
        if len(states) != len(rows) or not (norms > 0).all():  # llama.cpp answers with zeros where it has no state
            raise RuntimeError(f"llama.cpp gave {int((norms > 0).sum())} embeddings for {len(rows)} rows")
        return np.ascontiguousarray(states / norms, dtype=np.float32)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """llama.cpp's own token ids of a text; `special` lets it spell special tokens."""
        with self._post("/tokenize", {"content": text, "parse_special": special}) as response:
            return _checked(response)["tokens"]

    def generate(
        self, ids: Sequence[int], room: int, ends: Container[int], temperature: float = 0.0, seed: int = 0
    ) -> Generator[int, None, None]:
        """The tokens that continue `ids`, as they are generated: at most `room`, up to and with the first of `ends`.

        Before the last one is returned, the server is done with the row, so that what follows finds its cache free.
        Closing the iterator cancels the row. It ends early where the context does.

        Args:
            temperature: 0 is greedy; others sample from the model's own distribution.
            seed: of the sampling.

        Raises:
            InputError: llama.cpp rejects the row, such as one longer than the context.
        """
        written: list[int] = []
        sampling = {"temperature": temperature, "samplers": ["temperature"], "seed": seed}

        def request(size: int) -> dict[str, Any]:
            return {
                "prompt": [*ids, *written],
                "n_predict": size,
                "return_tokens": True,
                **sampling,
            }

        while len(written) < room:
            before = len(written)
            with self._post("/completion", request(room - before) | {"stream": True}) as response:
                for event in _events(response):
                    total = before + event["tokens_predicted"]
                    if total > len(written) + len(event["tokens"]):
                        break  # it sends nothing for a token that ends within a character
                    for token in event["tokens"]:
                        written.append(token)
                        if token in ends or len(written) == room:
                            response.read()
                            yield token
                            return
                        yield token
                else:
                    total = len(written)
            if total > len(written):
                with self._post("/completion", request(total - len(written))) as response:
                    hidden = _checked(response)["tokens"]
                for token in hidden:
                    written.append(token)
                    yield token
                    if token in ends:
                        return
            if len(written) == before:
                return

    def close(self) -> None:
        """End it, and free its memory."""
        self._end()

    @contextmanager
    def _post(self, path: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        assert self._address.hostname is not None
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        with closing(http.client.HTTPConnection(self._address.hostname, self._address.port)) as connection:
            connection.request("POST", path, json.dumps(body), headers)
            with closing(connection.getresponse()) as response:  # the server cancels what nobody reads any more
                yield response


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The server-sent events of a streamed answer, as they arrive."""
    if response.status != 200:
        _checked(response)
    for line in response:
        if line.startswith(b"data: "):
            event = json.loads(line.removeprefix(b"data: "))
            if "tokens_predicted" not in event:
                raise RuntimeError(f"llama.cpp stopped: {event}")
            yield event


def _checked(response: http.client.HTTPResponse) -> Any:
    record = json.loads(response.read())
    if response.status != 200:
        raise InputError(f"llama.cpp rejects this: {record.get('error', {}).get('message', record)}")
    return record
