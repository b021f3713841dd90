"""Whatever bytes stand in a file that a user gives, a reader answers with a result or with InputError, nothing else.

Half the files are any bytes; the others are good ones with a few places overwritten, which get further into a reader.
FUZZ_EXAMPLES sets how many are tried a reader.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from search_r3.data.beir import load_beir
from search_r3.data.io.jsonl import read_jsonl
from search_r3.data.pairs import read_pairs
from search_r3.data.recipe import read_recipe
from search_r3.data.sources.registry import SOURCES
from search_r3.errors import InputError
from search_r3.evaluation.baselines.external_models import parse_external_model
from search_r3.evaluation.runs import read_run
from search_r3.evaluation.suite_config import SuitePlan
from search_r3.index.chunking.chunker import chunk_document
from search_r3.index.readers.csv_file import read_csv
from search_r3.index.readers.path_source import open_source
from search_r3.model.checkpoint import CONTRACT_FILE, read_record
from search_r3.model.contract import Contract
from search_r3.model.resolve import weights_sha256
from search_r3.prompts import Prompts
from search_r3.training.config import load_config
from search_r3.training.grpo.grpo_config import GRPOConfig
from search_r3.training.sft.sft_config import SFTConfig

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # the files are small: shrinking one takes longer than reading it
)


PIECES = [
    *(b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x85", b"\xe2\x80\xa8", b"\r", b"\n", b"\t"),
    *(b"\\ud800", b"\x1f\x8b", b"%", b"@", b"`", b"|", b">", b"\n\n", b"#", b"- ", b"? ", b"=", b"~", b"---\n"),
    *(b'"', b"'", b"{", b"}", b"[", b"]", b":", b": ", b",", b"[]", b"{}", b'""', b"[[]]", b"{a: {b: c}}", b"...\n"),
    *(b"null", b"true", b"no", b"-1", b"0", b"1e999", b"NaN", b".inf", b"0x1F", b"1_000", b"9" * 5000, b"[" * 1200),
    *(b"2001-99-99", b"2001-02-30 99:99:99", b"!!int x", b"!!float x", b"!!timestamp x", b"!!binary x", b"!!str {}"),
    *(b"!!python/object/apply:os.system [ls]", b"!!set {a}", b"!!omap [a]", b"&a [*a]", b"*a", b"1:30:99"),
    *(b"<<: 1", b"<<: [1]", b"? [a]\n: b\n", b"? {a: b}\n: c\n"),
]  # fmt: skip
"""What is written over good bytes: what has meaning in JSON, YAML, TSV or gzip, and what is no text."""


def near(*good: bytes) -> st.SearchStrategy[bytes]:
    """Any bytes, or one of `good` with some places overwritten."""

    @st.composite
    def damaged(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(good)))
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(data)))
            gone = draw(st.sampled_from((0, 0, 1, 3, 12)))
            data[at : at + gone] = draw(st.sampled_from(PIECES) | st.binary(max_size=6))
        return bytes(data)

    return st.one_of(st.binary(max_size=60), damaged(), damaged(), damaged())


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Path(name)


def answers(read: Callable[[], Any]) -> None:
    """The reader gives a result, or InputError."""
    with contextlib.suppress(InputError):
        read()


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


PAIR = {"id": "p1", "query": "a", "positive": "b", "negatives": ["c"], "reasoning": "d", "source": "s"}


@fuzzed
@given(
    near(lines({"_id": "d1", "title": "T", "text": "words"}, {"_id": "d2", "text": "more", "metadata": {"a": 1}})),
    near(lines({"_id": "q1", "text": "a question"})),
    near(b"query-id\tcorpus-id\tscore\nq1\td1\t1\n"),
    st.booleans(),
)
def test_beir_folders(corpus, queries, qrels, skip):
    with folder() as place:
        (place / "qrels").mkdir()
        for name, data in (("corpus.jsonl", corpus), ("queries.jsonl", queries), ("qrels/test.tsv", qrels)):
            (place / name).write_bytes(data)
        answers(lambda: load_beir(place, "test", on_fault=(lambda *_: None) if skip else None))


@fuzzed
@given(near(lines(PAIR, {**PAIR, "id": "p2", "reasoning": None})))
def test_pairs_and_jsonl(data):
    with folder() as place:
        (place / "pairs.jsonl").write_bytes(data)
        answers(lambda: read_pairs(place / "pairs.jsonl"))
        answers(lambda: list(read_jsonl(place / "pairs.jsonl")))


CSV = b'id,text,year\na,some words,2020\nb,"more, words",2021\n'


@fuzzed
@given(near(CSV, b"id\ttext\na\tb\n"), st.sampled_from(("csv", "tsv")))
def test_csv(data, suffix):
    with folder() as place:
        (place / f"a.{suffix}").write_bytes(data)
        answers(lambda: list(read_csv(place / f"a.{suffix}")))


@fuzzed
@given(
    near(
        lines({"id": "a", "text": "some words", "year": 2020, "deep": {"b": [1]}}),
        b"# Title\n\nText.\n\n```py\ncode\n```\n\n## Part\n\n- item\n",
        b"Title\n=====\n\n.. code::\n\n   x\n",
        b'"""Doc."""\n\nclass A:\n    def b(self):\n        return 1\n',
    ),
    st.sampled_from(("jsonl", "ndjson", "md", "rst", "py", "c", "txt", "csv", "bin")),
)
def test_sources_of_an_index(data, suffix):
    with folder() as place:
        (place / f"a.{suffix}").write_bytes(data)
        for path in (place / f"a.{suffix}", place):
            answers(lambda path=path: [list(chunk_document(document)) for document in open_source(path)])


SFT = (
    b"pairs: [a.jsonl]\noutput: run\nweights: {sft: 0.5, kl: 0}\nmatryoshka: [8, 4]\n"
    b"loop:\n  steps: 3\n  betas: [0.9, 0.99]\n"
)
GRPO = (
    b"adapter: a\noutput: run\nqueries:\n  - {beir: scifact, hold_out_modulus: 8}\ncorpus: [{beir: scifact}]\n"
    b"environment:\n  refresh: {policy: selective}\nbeta: 0.02\n"
)
SUITE = b"systems: [bm25]\ndatasets: [scifact]\nmodes: [off]\nbudget: 8\n"
DATA = (
    b"seed: 1\ndamaged: skip\nsources:\n  - {kind: docstrings, packages: [json], limit: 3}\n"
    b"  - {kind: pairs, path: a.jsonl, name: own}\n  - {kind: titles, dataset: scifact}\n"
)


@fuzzed
@given(near(SFT), near(GRPO), near(SUITE))
def test_training_recipes_and_suites(sft, grpo, suite):
    with folder() as place:
        kinds: tuple[tuple[bytes, Any], ...] = ((sft, SFTConfig), (grpo, GRPOConfig), (suite, SuitePlan))
        for data, kind in kinds:
            (place / "a.yaml").write_bytes(data)
            answers(lambda kind=kind: load_config(place / "a.yaml", kind))


@fuzzed
@given(st.text(max_size=30) | st.sampled_from(PIECES).map(lambda piece: f"loop.steps={piece.decode('latin-1')}"))
def test_overrides_of_a_recipe(override):
    with folder() as place:
        (place / "a.yaml").write_bytes(SFT)
        answers(lambda: load_config(place / "a.yaml", SFTConfig, [override]))


@fuzzed
@given(near(DATA))
def test_data_recipes(data):
    with folder() as place:
        (place / "a.yaml").write_bytes(data)
        answers(lambda: read_recipe(place / "a.yaml", SOURCES))


@fuzzed
@given(near(b"model: m\nendpoint: http://localhost:1/v1\nkey_variable: A\n"))
def test_systems_in_files(data):
    with folder() as place:
        (place / "a.yaml").write_bytes(data)
        answers(lambda: parse_external_model(str(place / "a.yaml")))


@fuzzed
@given(near(b"q1 Q0 d1 1 0.5 us\nq1 Q0 d2 2 0.25 us\n"), st.booleans(), near(gzip.compress(b"q1 Q0 d1 1 0.5 us\n")))
def test_runs(data, packed, broken):
    with folder() as place:
        for name, content in (("a.trec", gzip.compress(data) if packed else data), ("b.gz", broken)):
            (place / name).write_bytes(content)
            answers(lambda name=name: read_run(place / name))


CONTRACT = Contract("base", "a" * 64, "", 400, 32, Prompts(), "b" * 64)
RECORD = {"kind": "adapter", "contract": CONTRACT.to_dict(), "contract_hash": CONTRACT.hash}
VALUES = st.sampled_from([None, True, -1, 0, 1, 2**70, 0.5, "", "x", [], [1], {}, {"a": 1}])


@fuzzed
@given(near(json.dumps(RECORD).encode()), st.sampled_from(sorted(RECORD["contract"])), VALUES)  # type: ignore[arg-type]
def test_contracts(data, key, value):
    with folder() as place:
        changed = json.dumps({**RECORD, "contract": {**CONTRACT.to_dict(), key: value}}).encode()
        for content in (data, changed):
            (place / CONTRACT_FILE).write_bytes(content)
            answers(lambda: Contract.from_dict((read_record(place) or {})["contract"], "here"))


@fuzzed
@given(
    near(
        b'\x40\x00\x00\x00\x00\x00\x00\x00{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}         \x00\x00\x80?'
    )
)
def test_weights(data):
    with folder() as place:
        (place / "model.safetensors").write_bytes(data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SEARCH_R3_CACHE", str(place / "cache"))
            answers(lambda: weights_sha256(place))
