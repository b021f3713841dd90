"""The int8 engine gives float32's embeddings to rounding, whatever the batch, and keeps what it made once."""

from __future__ import annotations

import builtins
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_family import MODELS, SIZES, make_model
from token_rows import distance, token_rows

pytest.importorskip("numba")
from search_r3 import InputError, SearchR3
from search_r3.model.engines import llama_forward
from search_r3.model.engines.int8 import avx512, elementwise_kernels, int8_engine, int8_weights
from search_r3.model.engines.int8.int8_forward import Int8Model, Int8Session
from search_r3.model.engines.llama_forward import LlamaSession, merge_projections
from search_r3.model.engines.registry import INT8

PREFIX = [5, 60, 7, 80, 9]
SAME = 1e-3
"""Cosine distance of one text's embeddings by two batches: rounding falls otherwise where sums are taken otherwise."""
NEAR = INT8.golden_tolerance
FINER = NEAR / 4
"""Only the weights (and attention's output, without the decoder) are rounded to int8."""
TEXTS = ["How do I read a file line by line in Python?", "Paris", "def mean(values):\n    return sum(values)"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache folder of this module's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEARCH_R3_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def int8(tiny_model: Path, cache: Path) -> SearchR3:
    return SearchR3.from_pretrained(tiny_model, engine="int8")


@pytest.fixture
def rows() -> list[list[int]]:
    """Twelve rows of mixed lengths, no special token among them."""
    return token_rows(3, 9, 1, 27, 4, 4, 14, 2, 40, 6, 8, 11)


def float_engine(model: SearchR3) -> Any:
    return SearchR3(model.checkpoint).engine


def generate(engine: Any, rows: list[list[int]], **changes: Any) -> Any:
    settings: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0, "seed": 0, "batch_size": 32}
    return engine.generate(PREFIX, rows, **settings | changes)


class TestEmbed:
    def test_it_is_near_float32_and_not_the_same(self, int8: SearchR3, rows: list[list[int]]) -> None:
        found, expected = int8.engine.embed(PREFIX, rows), float_engine(int8).embed(PREFIX, rows)
        assert 1e-6 < distance(found, expected) < NEAR
        assert found.dtype == np.float32
        assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)

    @pytest.mark.parametrize("size", [1, 5])
    def test_it_does_not_depend_on_the_batch(self, int8: SearchR3, rows: list[list[int]], size: int) -> None:
        assert distance(int8.engine.embed(PREFIX, rows, size), int8.engine.embed(PREFIX, rows, 32)) < SAME

    def test_the_shared_prefix_is_the_prefix(self, int8: SearchR3, rows: list[list[int]]) -> None:
        whole = [PREFIX + row for row in rows]
        assert distance(int8.engine.embed(PREFIX, rows), int8.engine.embed([], whole)) < NEAR  # it is not rounded

    def test_threads_give_the_same_rows_in_the_same_order(
        self, int8: SearchR3, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone, seen = int8.engine.embed(PREFIX, rows * 2), []
        monkeypatch.setattr(int8_engine, "_cores", lambda: 2)
        monkeypatch.setattr(int8_engine, "TOKENS_A_THREAD", 16)
        monkeypatch.setattr(int8_engine, "TOKENS_A_PASS", 64)
        assert distance(int8.engine.embed(PREFIX, rows * 2, 32, seen.append), alone) < SAME
        assert sum(seen) == 2 * len(rows)
        assert len(seen) > 2

    def test_an_error_in_a_thread_comes_out(
        self, int8: SearchR3, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(int8_engine, "_cores", lambda: 2)
        monkeypatch.setattr(int8_engine, "TOKENS_A_THREAD", 16)
        with pytest.raises(IndexError):
            int8.engine.embed(PREFIX, [*rows, [10**6]])


class TestLatentSteps:
    def test_they_are_near_float32_and_not_the_same(self, int8: SearchR3, rows: list[list[int]]) -> None:
        found, expected = int8.engine.embed_latent(PREFIX, rows, 3), float_engine(int8).embed_latent(PREFIX, rows, 3)
        assert 1e-6 < distance(found, expected) < NEAR
        assert found.dtype == np.float32
        assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)

    @pytest.mark.parametrize("size", [1, 5])
    def test_they_do_not_depend_on_the_batch(self, int8: SearchR3, rows: list[list[int]], size: int) -> None:
        alone = int8.engine.embed_latent(PREFIX, rows, 3, size)
        assert distance(int8.engine.embed_latent(PREFIX, rows, 3, 32), alone) < NEAR

    def test_they_are_the_same_without_the_decoder_of_few_tokens(
        self, int8: SearchR3, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = int8.engine.embed_latent(PREFIX, rows, 3)
        monkeypatch.setattr(int8.engine._packed, "decoder", None)
        assert distance(int8.engine.embed_latent(PREFIX, rows, 3), found) < NEAR


class TestGenerate:
    def test_the_embedding_is_the_state_at_the_embed_token(self, int8: SearchR3, rows: list[list[int]]) -> None:
        """One pass with a cache, against one prefill over what was written."""
        written = generate(int8.engine, rows)
        whole = [[*row, *found.token_ids, int8.engine.embed_id] for row, found in zip(rows, written, strict=True)]
        expected = float_engine(int8).embed(PREFIX, whole)
        assert distance([found.embedding for found in written], expected) < FINER
        assert all(len(found.token_ids) <= 8 for found in written)

    def test_it_stops_where_float32_stops(
        self, int8: SearchR3, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Rows that write the embed token, an end of turn, or neither, and leave the batch at different tokens."""
        plain = float_engine(int8)
        for engine in (int8.engine, plain):

            def choose(state_BD: torch.Tensor, temperature: float, random: Any, engine: Any = engine) -> torch.Tensor:
                del temperature, random
                token_B = torch.full((len(state_BD),), 20)
                token_B[state_BD[:, 0] > 1.0] = engine.embed_id
                token_B[state_BD[:, 1] > 1.6] = int(engine.stop_ids[0])
                return token_B

            monkeypatch.setattr(engine, "_choose", choose)
        found, expected = generate(int8.engine, rows), generate(plain, rows)
        same = [f.token_ids == e.token_ids and f.ended == e.ended for f, e in zip(found, expected, strict=True)]
        assert sum(same) >= len(rows) - 3  # the states of two of them come to lie on the border
        assert {f.forced for f in found} == {True, False}
        assert len({len(f.token_ids) for f in found}) > 1
        assert all(len(f.token_ids) == 8 for f in found if f.forced and f.ended is None)

    def test_the_logits_are_near_the_heads(self, int8: SearchR3) -> None:
        state_BD = torch.randn(5, int8.dimension, generator=torch.Generator().manual_seed(0))
        expected = int8.checkpoint.model.get_output_embeddings()(state_BD)
        assert (int8.engine.head(state_BD) - expected).abs().max() < 0.02 * expected.abs().max()

    def test_samples_of_a_seed_are_the_same_again(self, int8: SearchR3, rows: list[list[int]]) -> None:
        once = generate(int8.engine, rows, temperature=1.0, samples=2, seed=3)
        again = generate(int8.engine, rows, temperature=1.0, samples=2, seed=3)
        assert [found.token_ids for found in once] == [found.token_ids for found in again]
        assert len(once) == 2 * len(rows)

    def test_rows_that_join_late_are_continued_beside_the_others(self, int8: SearchR3, rows: list[list[int]]) -> None:
        """Continuous batching runs on the same sessions."""
        slots, done = int8.engine.continuous_batch(PREFIX), {}
        handles = slots.join(rows[:4], [8] * 4)
        written: dict[int, list[int]] = {handle: [] for handle in range(8)}
        for step in range(40):
            if step == 3:
                handles += slots.join(rows[4:8], [8] * 4)
            for one in slots.step():
                if one.done is None:
                    written[one.handle].append(one.token)
                else:
                    done[one.handle] = one.done
            if len(done) == 8:
                break
        whole = [[*row, *done[h].token_ids, int8.engine.embed_id] for row, h in zip(rows[:8], handles, strict=True)]
        expected = float_engine(int8).embed(PREFIX, whole)
        assert distance([done[h].embedding for h in handles], expected) < FINER
        assert [done[h].token_ids for h in handles] == [written[h] for h in handles]


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_session_gives_the_states_of_the_float_session(
    name: str, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding in the middle, tokens one by one, rows that leave, and the states at columns that are asked for."""
    if fine:  # sizes that the decoder takes
        monkeypatch.setitem(SIZES, "hidden_size", 96)
    model = make_model(name)
    layers = merge_projections(model)
    assert layers is not None
    elementwise_kernels.compile_kernels()
    rounded = int8_weights.quantize_model(model, layers, model.lm_head.weight)
    packed = Int8Model.of(layers, rounded, model.lm_head.weight.detach(), model.config)
    assert (packed.decoder is not None) == (fine and avx512.runs_here())
    ids_BL = torch.randint(128, (4, 7), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones(4, 14, dtype=torch.long)
    mask_BT[1, 3:6] = 0  # padding between a prefix of three tokens and the row
    position_BL = (mask_BT.cumsum(-1) - 1).clamp_min(0)
    states = []
    for kind, parts in ((LlamaSession, layers), (partial(Int8Session, fine=fine), packed)):
        first = kind(model.model, parts, [], 1, 3)
        first.feed(ids_BL[:1, :3], torch.arange(3)[None])
        session = kind(model.model, parts, first.prefix(), 4, 9)
        found = [
            session.feed(ids_BL, position_BL[:, 3:10], mask_BT[:, :10]),
            session.feed(ids_BL[:, :1], position_BL[:, 10:11], mask_BT[:, :11]),
        ]
        session.keep(torch.tensor([1, 3]))
        found.append(session.feed(ids_BL[:2, 2:3], position_BL[[1, 3], 11:12], mask_BT[[1, 3], :12]))
        other = kind(model.model, parts, first.prefix(), 4, 9)
        found.append(other.feed(ids_BL, position_BL[:, 3:10], None, torch.tensor([0, 6, 2, 4])))
        states.append(torch.cat(found))
    assert torch.cosine_similarity(*states).min() > 1 - (FINER if fine else NEAR)
    if fine and packed.decoder is not None:  # more tokens than fit a pass
        monkeypatch.setattr(packed.decoder, "few", 16)
        monkeypatch.setattr(packed.decoder, "_tiles", True)
        passes, step = [], packed.decoder.step
        monkeypatch.setattr(packed.decoder, "step", lambda x, *given: passes.append(len(x)) or step(x, *given))
        other = Int8Session(model.model, packed, first.prefix(), 4, 9, fine=True)
        again = other.feed(ids_BL, position_BL[:, 3:10], mask_BT[:, :10])
        assert passes == [14, 14]
        assert torch.cosine_similarity(again, states[0][:4]).min() > 1 - FINER
        assert other.length == 10
    if fine:  # the same without the decoder, as on other machines and for many tokens
        monkeypatch.setattr(packed, "decoder", None)
        session = Int8Session(model.model, packed, [], 4, 7, fine=True)
        other = LlamaSession(model.model, layers, [], 4, 7)
        found = [one.feed(ids_BL, torch.arange(7).expand(4, 7), None, None) for one in (session, other)]
        assert torch.cosine_similarity(*found).min() > 1 - FINER


@torch.inference_mode()
def test_the_best_token_is_the_float_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    layers = merge_projections(model)
    assert layers is not None
    elementwise_kernels.compile_kernels()
    head_VD = model.lm_head.weight.detach()
    packed = Int8Model.of(layers, int8_weights.quantize_model(model, layers, head_VD), head_VD, model.config)
    state_BD = torch.randn(200, 48, generator=torch.Generator().manual_seed(0))
    exact_BV = state_BD @ head_VD.T
    found_BV = packed.logits(state_BD)
    assert torch.equal(found_BV.argmax(-1), exact_BV.argmax(-1))
    assert torch.allclose(found_BV.topk(4).values, exact_BV.topk(4).values, atol=1e-4)
    assert torch.allclose(found_BV, exact_BV, atol=0.1 * float(exact_BV.abs().max()))


class TestTheFile:
    def made(self, cache: Path) -> Path:
        (file,) = (cache / "int8").glob("*.safetensors")
        return file

    @pytest.fixture
    def makings(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """One entry for each time that a model is rounded."""
        seen: list[int] = []
        make = int8_engine.quantize_model
        monkeypatch.setattr(int8_engine, "quantize_model", lambda *given: seen.append(1) or make(*given))
        return seen

    def test_it_is_made_once(self, int8: SearchR3, tiny_model: Path, cache: Path, makings: list[int]) -> None:
        again = SearchR3.from_pretrained(tiny_model, engine="int8")
        assert not makings
        assert self.made(cache).name == f"{int8.contract_hash}.safetensors"
        assert np.array_equal(again.encode_document(TEXTS), int8.encode_document(TEXTS))

    @pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
    def test_a_broken_one_is_made_again(
        self, int8: SearchR3, tiny_model: Path, cache: Path, makings: list[int], damage: str
    ) -> None:
        file = self.made(cache)
        whole = file.read_bytes()
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1 :]
        file.write_bytes({"cut": whole[:middle], "flipped": flipped, "empty": b""}[damage])
        again = SearchR3.from_pretrained(tiny_model, engine="int8")
        assert makings == [1]
        assert file.stat().st_size == len(whole)
        assert int8_weights.load_int8(file, int8.contract_hash) is not None
        assert np.array_equal(again.encode_document(TEXTS), int8.encode_document(TEXTS))

    def test_another_models_is_not_taken(
        self, int8: SearchR3, other_tiny_model: Path, cache: Path, makings: list[int], tmp_path: Path
    ) -> None:
        other = SearchR3.from_pretrained(other_tiny_model)
        assert int8_weights.load_int8(self.made(cache), other.contract_hash) is None

    def test_a_cache_that_cannot_be_written_costs_only_time(
        self, int8: SearchR3, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, makings: list[int]
    ) -> None:
        (tmp_path / "int8").write_text("a file where the folder should be")
        monkeypatch.setenv("SEARCH_R3_CACHE", str(tmp_path))
        model = SearchR3.from_pretrained(tiny_model, engine="int8")
        assert makings == [1]
        assert np.array_equal(model.encode_document(TEXTS), int8.encode_document(TEXTS))


class TestTheModel:
    def test_it_keeps_the_contract_and_says_what_it_computes_in(self, int8: SearchR3, tiny_model: Path) -> None:
        """An index of float32 may be searched with int8: the hash is of the weights, and the distance is small."""
        plain = SearchR3.from_pretrained(tiny_model, device="cpu")
        assert int8.contract_hash == plain.contract_hash
        assert (int8.dtype, plain.dtype) == ("int8", "float32")
        assert distance(int8.encode_document(TEXTS), plain.encode_document(TEXTS)) < NEAR
        found, expected = (m.encode_query(TEXTS, reasoning=False) for m in (int8, plain))
        assert distance(found, expected) < NEAR

    def test_weights_that_change_are_rounded_again(self, tiny_model: Path, cache: Path, rows: list[list[int]]) -> None:
        model = SearchR3.from_pretrained(tiny_model, engine="int8")
        before = model.engine.embed(PREFIX, rows)
        with torch.no_grad():
            model.checkpoint.model.model.layers[0].self_attn.v_proj.weight.mul_(3.0)
        after = model.engine.embed(PREFIX, rows)
        assert distance(before, after) > NEAR
        assert distance(after, float_engine(model).embed(PREFIX, rows)) < NEAR

    def test_golden_vectors_of_float32_hold_it(self, tiny_adapter: Path, cache: Path) -> None:
        found = SearchR3.from_pretrained(tiny_adapter, engine="int8").check_golden()
        assert found is not None
        assert 1e-6 < found < NEAR

    def test_it_is_not_saved(self, int8: SearchR3, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="load it with engine torch"):
            int8.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()


class TestRefusals:
    def test_another_dtype_or_device(self, tiny_model: Path) -> None:
        with pytest.raises(InputError, match="float32 weights on a cpu, not bfloat16 on cpu"):
            SearchR3.from_pretrained(tiny_model, engine="int8", dtype="bfloat16")

    def test_another_architecture(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        monkeypatch.setattr(llama_forward, "FAMILY", ("Qwen2ForCausalLM",))
        with pytest.raises(InputError, match="not LlamaForCausalLM as loaded here; use engine torch"):
            SearchR3.from_pretrained(tiny_model, engine="int8")

    def test_numba_is_missing(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def refuse(name: str, *rest: Any, **more: Any) -> Any:
            if name == "numba":
                raise ModuleNotFoundError("No module named 'numba'", name="numba")
            return real(name, *rest, **more)

        monkeypatch.setattr(builtins, "__import__", refuse)
        with pytest.raises(InputError, match=r"package (numba|llvmlite); run: pip install 'search-r3\[int8\]'"):
            SearchR3.from_pretrained(tiny_model, engine="int8")

    def test_a_processor_whose_products_overflow(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        exact = int8_weights.Int8Matrix.__call__
        monkeypatch.setattr(int8_weights.Int8Matrix, "__call__", lambda self, x: exact(self, x).clamp(max=32767 * 100))
        with pytest.raises(InputError, match="needs a processor with VNNI"):
            SearchR3.from_pretrained(tiny_model, engine="int8")

    def test_an_unknown_engine(self, tiny_model: Path) -> None:
        with pytest.raises(InputError, match=r"no engine 'int9'; did you mean 'int8'\? choose one of: auto, torch"):
            SearchR3.from_pretrained(tiny_model, engine="int9")


def test_each_thread_of_the_pool_has_one_core_and_others_keep_theirs(int8: SearchR3) -> None:
    before, engine = torch.get_num_threads(), int8_engine.Int8Engine.__new__(int8_engine.Int8Engine)
    engine._pool, engine._pool_lock = None, threading.Lock()
    try:
        torch.set_num_threads(3)
        assert list(engine._threads(2).map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as another:
            assert another.submit(torch.get_num_threads).result(60) == 3
    finally:
        torch.set_num_threads(before)
        if engine._pool is not None:
            engine._pool.shutdown()
