from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vllm_stand_in import StandInVllm

from search_r3 import SearchR3
from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.training.config import LoraSettings
from search_r3.training.grpo.log_probs import token_log_probs
from search_r3.training.grpo.rollout_engines import EngineRollouts
from search_r3.training.lora.concatenation import ConcatenatedAdapter, concatenate
from search_r3.training.lora.live_encoder import LiveEncoder
from search_r3.training.lora.policy import Policy, Rows, add_lora

QUERIES = ["what is beta", "how do I read a file line by line", "Paris"]
SAMPLING: dict[str, Any] = {"max_tokens": 6, "max_query_tokens": 12, "temperature": 1.0, "seed": 5}


def shaken(policy: Policy, by: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def policy_of(folder: Path, rank: int = 4, alpha: float = 8) -> tuple[Policy, checkpoints.Checkpoint]:
    loaded = checkpoints.load(folder, dtype=torch.float32)
    torch.manual_seed(0)
    model = add_lora(loaded, LoraSettings(rank=rank, alpha=alpha))
    return Policy(model, loaded.contract.embed_token_id, len(loaded.tokenizer)), loaded


@pytest.fixture
def live(tiny_model: Path) -> LiveEncoder:
    policy, loaded = policy_of(tiny_model)
    shaken(policy)
    return LiveEncoder(policy, loaded, torch.float32)


def test_rollouts_are_what_the_policy_gives_in_one_forward_pass(live: LiveEncoder) -> None:
    encoder = live.sync()
    engine = EngineRollouts()
    engine.sync(encoder)
    found = engine.sample(QUERIES, 4, **SAMPLING)
    assert len(found) == 12
    assert len({tuple(r.token_ids) for r in found}) > 6
    template, embed = encoder.templates["reasoning"], encoder.contract.embed_token_id
    rows = Rows(
        template.prefix, [[*r.prompt_ids, *r.token_ids, embed] for r in found], [len(r.token_ids) + 1 for r in found]
    )
    with torch.no_grad():
        encoded = live.policy({"rollouts": rows})["rollouts"]
    for rollout, embedding in zip(found, encoded.embedding_BD.numpy(), strict=True):
        np.testing.assert_allclose(rollout.embedding, embedding, atol=1e-5)
        assert rollout.text == encoder.tokenizer.decode(rollout.token_ids).strip()
        assert max(rollout.token_ids, default=0) < len(encoder.tokenizer)
        assert rollout.forced or rollout.ended is None
    assert encoded.logits_TV is not None
    assert encoded.logits_TV.shape == (sum(len(r.token_ids) + 1 for r in found), len(encoder.tokenizer))


def test_rollouts_follow_the_distribution_that_the_loss_takes_logs_of(live: LiveEncoder) -> None:
    encoder = live.sync()
    engine = EngineRollouts(batch_size=4000)
    engine.sync(encoder)
    found = engine.sample(QUERIES[:1], 4000, **SAMPLING | {"max_tokens": 1, "temperature": 0.6})
    first = [r.token_ids[0] if r.token_ids else r.ended or encoder.contract.embed_token_id for r in found]
    template = encoder.templates["reasoning"]
    rows = Rows(template.prefix, [[*found[0].prompt_ids, encoder.contract.embed_token_id]], [1])
    with torch.no_grad():
        logits = live.policy({"rollouts": rows})["rollouts"].logits_TV
    ids = torch.arange(logits.shape[1])
    expected = token_log_probs(logits.expand(len(ids), -1), ids, 0.6)[0].exp().numpy()
    seen = np.bincount(first, minlength=len(ids)) / len(first)
    assert abs(seen - expected).sum() < 0.25  # total variation of 4,000 draws over about 100 likely tokens
    warmer = token_log_probs(logits.expand(len(ids), -1), ids, 2.0)[0].exp().numpy()
    assert abs(seen - warmer).sum() > 0.5


def test_the_same_seed_gives_the_same_rollouts_and_another_others(live: LiveEncoder) -> None:
    engine = EngineRollouts()
    with pytest.raises(RuntimeError, match="sync first"):
        engine.sample(QUERIES, 2, **SAMPLING)
    engine.sync(live.sync())
    ids = [[r.token_ids for r in engine.sample(QUERIES, 4, **SAMPLING | {"seed": seed})] for seed in (5, 5, 6)]
    assert ids[0] == ids[1]
    assert ids[0] != ids[2]


def test_a_rollout_depends_on_its_query_and_seed_and_on_nothing_beside_it(live: LiveEncoder) -> None:
    engine, seeds = EngineRollouts(batch_size=6), [7, 8, 9]
    engine.sync(live.sync())
    together = engine.sample(QUERIES, 3, **SAMPLING | {"seed": seeds})
    for i, query in enumerate(QUERIES):
        alone = engine.sample([query], 3, **SAMPLING | {"seed": seeds[i : i + 1]})
        assert [r.token_ids for r in alone] == [r.token_ids for r in together[3 * i : 3 * i + 3]]
    assert len({tuple(r.token_ids) for r in together}) > 4
    assert engine.sample([], 3, **SAMPLING | {"seed": []}) == []


def test_the_live_encoder_has_the_weights_of_now_without_a_new_copy(live: LiveEncoder) -> None:
    encoder = live.sync()
    before = encoder.encode_document(QUERIES)
    weight = encoder.checkpoint.model.get_decoder().layers[0].mlp.down_proj.weight
    shaken(live.policy)
    assert live.sync() is encoder
    assert encoder.checkpoint.model.get_decoder().layers[0].mlp.down_proj.weight is weight
    after = encoder.encode_document(QUERIES)
    fresh = LiveEncoder(live.policy, live.checkpoint, torch.float32).sync().encode_document(QUERIES)
    np.testing.assert_allclose(after, fresh, atol=1e-6)
    assert abs(after - before).max() > 0.01


def saved_stage_one(tiny_model: Path, folder: Path, alpha: float = 8) -> Path:
    policy, loaded = policy_of(tiny_model, rank=4, alpha=alpha)
    shaken(policy)
    folder.mkdir()
    checkpoints.save_adapter(policy.model, loaded.contract, folder)
    return folder


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], ["layers.1.self_attn.v_proj"]])
def test_an_adapter_on_a_merged_adapter_is_saved_as_one_of_the_original_base(
    targets: Any, tiny_model: Path, tmp_path: Path
) -> None:
    first = saved_stage_one(tiny_model, tmp_path / "first")
    merged = checkpoints.load(first, dtype=torch.float32)
    model = add_lora(merged, LoraSettings(rank=3, alpha=9, target_modules=targets))
    policy = Policy(model, merged.contract.embed_token_id, len(merged.tokenizer))
    shaken(policy)
    with torch.no_grad():  # saved weights are bfloat16: let the trained ones be, so that nothing is lost
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.to(torch.bfloat16))
    here = LiveEncoder(policy, merged, torch.float32).sync()
    (tmp_path / "both").mkdir()
    checkpoints.save_adapter(ConcatenatedAdapter(first, model), merged.contract, tmp_path / "both")
    again = SearchR3.from_pretrained(tmp_path / "both", device="cpu", dtype="float32")
    assert again.contract.base_weights == merged.contract.base_weights
    assert json.loads((tmp_path / "both" / "adapter_config.json").read_text())["r"] == 7
    np.testing.assert_allclose(again.encode_document(QUERIES), here.encode_document(QUERIES), atol=1e-2)
    # To the last digit but for bfloat16: the scales' ratio, 3 / 2, keeps B's last bit out of it.
    exact = concatenate(
        load_file(first / checkpoints.ADAPTER_FILE), peft_tensors(model, tmp_path / "second"), 8 / 4, 9 / 3
    )
    for name, layer in model.get_base_model().named_modules():
        key = f"base_model.model.{name}"
        if key + ".lora_A.weight" in exact and hasattr(layer, "base_layer"):
            ours = 2.0 * exact[key + ".lora_B.weight"] @ exact[key + ".lora_A.weight"]
            original = checkpoints.load_base(tiny_model, dtype=torch.float32).model.get_submodule(name).weight
            theirs = layer.base_layer.weight + layer.get_delta_weight("default")
            torch.testing.assert_close(original + ours, theirs, atol=1e-5, rtol=0)


def peft_tensors(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return load_file(folder / checkpoints.ADAPTER_FILE)


def test_only_plain_lora_is_built_upon(tiny_model: Path, tmp_path: Path) -> None:
    first = saved_stage_one(tiny_model, tmp_path / "first")
    settings = json.loads((first / "adapter_config.json").read_text())
    (first / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(InputError, match="use_dora = True; only plain LoRA"):
        ConcatenatedAdapter(first, None)


@pytest.mark.parametrize("keeps_stop_token", [True, False])
def test_vllm_rollouts_are_read_to_the_token_and_embedded_by_our_engine(
    keeps_stop_token: bool, live: LiveEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = live.sync()
    eos, embed = encoder.engine.stop_ids.item(), encoder.contract.embed_token_id
    scripts = [[11, 12, embed], [13, eos], list(range(20, 30)), [embed]]
    vllm = StandInVllm(lambda number, written: scripts[number % 4][len(written)], keeps_stop_token=keeps_stop_token)
    vllm.install(monkeypatch)
    engine = EngineRollouts("vllm", folder=tmp_path / "merged")
    engine.sync(encoder)
    found = engine.sample(QUERIES, 4, **SAMPLING)
    assert [(r.token_ids, r.forced, r.ended) for r in found[:4]] == [
        ([11, 12], False, None),
        ([13], True, eos),
        ([20, 21, 22, 23, 24, 25], True, None),
        ([], False, None),
    ]
    asked = [request.params for request in vllm.engine.seen]
    assert len({params.seed for params in asked}) == len(found) == 12  # each has its own
    assert {params.temperature for params in asked} == {1.0}
    ours = EngineRollouts()
    ours.sync(encoder)
    assert [r.prompt_ids for r in found] == [r.prompt_ids for r in ours.sample(QUERIES, 4, **SAMPLING)]
    ids = [*encoder.templates["reasoning"].prefix, *found[1].prompt_ids, 13, embed]
    with torch.no_grad():
        state = encoder.checkpoint.model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    np.testing.assert_allclose(found[1].embedding, torch.nn.functional.normalize(state, dim=-1), atol=1e-5)


def test_vllm_starts_on_the_merged_weights_and_gets_the_new_ones_at_each_sync(
    live: LiveEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = StandInVllm()
    vllm.install(monkeypatch)
    engine = EngineRollouts("vllm", folder=tmp_path / "merged")
    engine.sync(live.sync())
    (started,) = vllm.started
    before = load_file(started.folder / "model.safetensors")
    assert started.pushed == []
    shaken(live.policy)
    engine.sync(live.sync())
    (pushed,) = started.pushed
    assert started.resets == 1
    assert pushed.keys() == before.keys()  # names as a checkpoint has them, no tied head
    name = "model.layers.1.mlp.up_proj.weight"
    assert (pushed[name] - before[name]).abs().max() > 1e-3


def test_vllm_that_is_not_installed_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"search-r3\[vllm\]"):
        EngineRollouts("vllm", folder=tmp_path)
