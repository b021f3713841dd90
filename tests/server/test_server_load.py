"""Twenty clients at once, a quarter of them sending rubbish or hanging up: every good request is answered right."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter

import numpy as np
from serving_tools import Running, eventually

from search_r3 import SearchR3

CLIENTS, SECONDS = 20, 3.0
TEXTS = [f"text number {i} " + "word " * (i % 7) for i in range(40)]


def test_good_requests_are_answered_right_among_rubbish(served: Running, tiny: SearchR3) -> None:
    documents = tiny.encode_document(TEXTS)
    reasoned = tiny.encode_query(TEXTS, max_reasoning_tokens=4)
    end = time.monotonic() + SECONDS
    statuses: Counter[str] = Counter()
    wrong: list[str] = []

    def good(rng: random.Random) -> None:
        chosen = rng.sample(range(len(TEXTS)), rng.randint(1, 5))
        query = rng.random() < 0.5
        more = {"input_type": "query", "reasoning": 4} if query else {}
        answer = served.embed([TEXTS[i] for i in chosen], **more)
        statuses[f"good {answer.status}"] += 1
        if answer.status == 200:
            vectors = np.array([e["embedding"] for e in answer.json["data"]], dtype=np.float32)
            expected = (reasoned if query else documents)[chosen]
            if not np.allclose(vectors, expected, atol=1e-5):
                wrong.append(f"{chosen} {query}: {np.abs(vectors - expected).max()}")

    def bad(rng: random.Random) -> None:
        kind = rng.randrange(4)
        if kind == 0:
            statuses[f"bad {served.post('/v1/embeddings', rng.randbytes(200)).status}"] += 1
        elif kind == 1:
            statuses[f"bad {served.embed([[1, -5]]).status}"] += 1
        elif kind == 2:
            served.open_embed(TEXTS).close()
        else:
            with served.open(rng.randbytes(100) + b"\r\n\r\n") as connection:
                connection.shutdown(socket.SHUT_WR)
                connection.recv(100)

    def client(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end or (statuses["good 200"] <= CLIENTS and time.monotonic() < end + 30):
            try:
                (bad if number % 4 == 0 else good)(rng)
            except ConnectionError:
                statuses["reset"] += 1

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
    assert statuses["good 200"] > CLIENTS
    assert set(statuses) <= {"good 200", "bad 400", "reset"}
    eventually(lambda: served.service.in_flight == 0)
    assert served.service.batcher.waiting() == (0, 0)
    assert served.ask("GET", "/health").status == 200
