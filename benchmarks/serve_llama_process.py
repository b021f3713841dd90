"""The process of serve_llama.py's peer: `python serve_llama_process.py FILE THREADS` serves a GGUF file over HTTP.

It imports nothing but llama.cpp, so that its start-up and memory are llama.cpp's own. The address is printed when the
model is loaded; the process ends with its input.
"""

from __future__ import annotations

import os
import sys

SEQUENCES, CONTEXT = 8, 1024
"""What is run at once, and tokens of each: as in the engine llama.cpp."""


def main(file: str, threads: int) -> None:
    """Serve `file`; 0 threads are llama.cpp's own choice."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.embedding = True
    settings.n_parallel, settings.n_ctx = SEQUENCES, SEQUENCES * CONTEXT
    if threads:
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.verbosity = -1
    settings.cache_ram_mib = 0  # a cache of whole prompts: ours is off as well
    server = xllamacpp.Server(settings)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # a server that is closed before its loop has begun waits for ever


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
