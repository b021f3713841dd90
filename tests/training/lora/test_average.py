"""The average of adapters: products and not factors, the best of its rank, and what cannot be averaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from search_r3 import SearchR3
from search_r3.cli import main
from search_r3.errors import InputError
from search_r3.model import checkpoint as checkpoints
from search_r3.model.resolve import weights_sha256
from search_r3.prompts import with_reading
from search_r3.training.lora.average import average_adapters, average_products, average_tensors

TEXTS = ["How do I read a file?", "Aspirin lowers the risk of heart attack.", "x"]


@pytest.fixture(scope="module")
def pair(tiny_model: Path, save_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two random adapters of rank 2 on one base."""
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(tiny_model, folder / name, seed) for name, seed in (("a", 1), ("b", 2))]


@pytest.fixture
def copied(pair: list[Path], tmp_path: Path) -> Path:
    """A copy of the second adapter, to be spoiled."""
    return Path(shutil.copytree(pair[1], tmp_path / "copied"))


@pytest.fixture
def tiny_reader(pair: list[Path], tmp_path: Path) -> Path:
    """An adapter that reads four passages."""
    loaded = checkpoints.load(pair[0], dtype=torch.float32, merge=False)
    contract = replace(loaded.contract, prompts=with_reading(loaded.contract.prompts, 4, 8))
    checkpoints.save_adapter(loaded.model, contract, tmp_path / "reader")
    SearchR3.from_pretrained(tmp_path / "reader", device="cpu").write_golden(tmp_path / "reader")
    return tmp_path / "reader"


def factors(*ranks: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(9, r, generator=generator), torch.randn(r, 7, generator=generator)) for r in ranks]


@pytest.mark.parametrize("ranks", [(3, 3), (2, 4), (1, 2, 3), (5, 6)])  # the last: more than the layer's rank
def test_at_the_sum_of_the_ranks_the_products_are_averaged_exactly(ranks):
    parts, weights = factors(*ranks), [0.5, 0.3, 0.2][: len(ranks)]
    b, a, _ = average_products(parts, weights, sum(ranks))
    assert b.shape == (9, sum(ranks))
    assert a.shape == (sum(ranks), 7)
    expected = sum(w * b.double() @ a.double() for w, (b, a) in zip(weights, parts, strict=True))
    torch.testing.assert_close(b @ a, expected, rtol=1e-12, atol=1e-12)


def test_at_a_smaller_rank_it_is_the_best_approximation_that_there_is():
    parts = factors(3, 3)
    exact = sum(0.5 * b.double() @ a.double() for b, a in parts)
    u, s, vh = torch.linalg.svd(exact)
    b, a, squares = average_products(parts, [0.5, 0.5], 2)
    torch.testing.assert_close(b @ a, (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(squares[:6], s[:6].square(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(b.square().sum(0), a.square().sum(1), rtol=1e-10, atol=1e-10)  # neither factor outgrows


def test_the_part_that_is_kept_counts_all_layers():
    parts = [
        {f"{layer}.lora_{factor}.weight": {"A": a, "B": b}[factor] for layer in "xy" for factor in "AB"}
        for b, a in factors(2, 2)
    ]
    assert average_tensors(parts, [1, 1], [0.5, 0.5], 4)[1] == pytest.approx(1)
    s = torch.linalg.svdvals(sum(b @ a for b, a in factors(2, 2)))
    expected = float(s[:2].square().sum() / s.square().sum())
    assert average_tensors(parts, [1, 1], [0.5, 0.5], 2)[1] == pytest.approx(expected, rel=1e-5)


def merged(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(folder, dtype=torch.float32).model.state_dict()


def test_the_average_of_two_adapters_is_the_average_of_their_merged_models(pair, tmp_path):
    made = average_adapters(pair, tmp_path / "soup", weights=[3, 1], rank=4)
    assert (made.rank, made.full_rank, made.weights) == (4, 4, [0.75, 0.25])
    assert made.kept == pytest.approx(1)
    one, two, soup = (merged(folder) for folder in (*pair, tmp_path / "soup"))
    for name, value in soup.items():  # the embed token's row is in it; factors are saved in bfloat16
        expected = 0.75 * one[name] + 0.25 * two[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
        if "_proj" in name:
            assert (one[name] - two[name]).abs().max() > 0.1 * expected.abs().max()


def test_the_new_adapter_has_the_same_contract_with_weights_and_golden_vectors_of_its_own(pair, tmp_path):
    average_adapters(pair, tmp_path / "soup")
    models = [SearchR3.from_pretrained(folder, device="cpu") for folder in (*pair, tmp_path / "soup")]
    assert len({model.contract_hash for model in models}) == 3
    assert models[2].contract.adapter_weights == weights_sha256(tmp_path / "soup", checkpoints.ADAPTER_FILE)
    assert models[2].contract.prompts == models[0].contract.prompts
    assert (models[2].check_golden() or 1) < 1e-4
    record = checkpoints.read_record(tmp_path / "soup") or {}
    assert [(one["name"], one["weight"]) for one in record["average_of"]] == [("a", 0.5), ("b", 0.5)]
    assert [one["contract_hash"] for one in record["average_of"]] == [model.contract_hash for model in models[:2]]
    assert json.loads((tmp_path / "soup" / "adapter_config.json").read_text())["r"] == 2
    assert models[2].encode_document(TEXTS).shape == (3, 32)


def test_one_adapter_can_get_another_number_of_passages(tmp_path, pair, tiny_reader):
    average_adapters([tiny_reader], tmp_path / "two", reading_passages=2)
    before, after = (SearchR3.from_pretrained(folder, device="cpu") for folder in (tiny_reader, tmp_path / "two"))
    assert after.reading == replace(before.reading, passages=2)
    assert after.contract == replace(
        before.contract, prompts=after.contract.prompts, adapter_weights=after.contract.adapter_weights
    )
    assert np.array_equal(after.encode_query(TEXTS), before.encode_query(TEXTS))
    average_adapters([tmp_path / "two"], tmp_path / "three", reading_passages=3)
    records = [checkpoints.read_record(tmp_path / name) or {} for name in ("two", "three")]
    assert records[0]["average_of"] == records[1]["average_of"]
    for adapter, passages, message in (
        (tiny_reader, 11, "from 0 to 10"),
        (tiny_reader, 0, "at least 1"),
        (pair[0], 2, "for adapters that read passages"),
    ):
        with pytest.raises(InputError, match=message):
            average_adapters([adapter], tmp_path / "none", reading_passages=passages)


def test_an_adapter_and_its_copy_average_to_itself(pair, copied, tmp_path):
    made = average_adapters([pair[1], copied], tmp_path / "soup")
    assert made.kept == pytest.approx(1)  # the sum has the rank of one
    one, two = (SearchR3.from_pretrained(f, device="cpu").encode_query(TEXTS) for f in (copied, tmp_path / "soup"))
    assert (np.sum(one * two, axis=1) > 0.999).all()


def test_adapters_of_different_ranks_and_scales_are_averaged_by_their_products(pair, tmp_path):
    average_adapters([pair[0], pair[1]], tmp_path / "four", rank=4)
    change_settings(tmp_path / "four", lora_alpha=20.0)  # another scale than the other
    average_adapters([tmp_path / "four", pair[0]], tmp_path / "soup", rank=6)
    one, two, soup = (merged(folder) for folder in (tmp_path / "four", pair[0], tmp_path / "soup"))
    for name, value in soup.items():
        expected = (one[name] + two[name]) / 2
        torch.testing.assert_close(value, expected, rtol=0, atol=0.03 * float(expected.abs().max()))


def change_settings(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_contract(folder: Path, **changes: Any) -> None:
    path = folder / checkpoints.CONTRACT_FILE
    record = json.loads(path.read_text())
    record["contract"] |= changes
    path.write_text(json.dumps(record))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / checkpoints.ADAPTER_FILE)
    change(tensors)
    save_file(tensors, folder / checkpoints.ADAPTER_FILE, {"format": "pt"})
    change_contract(folder, adapter_weights=weights_sha256(folder, checkpoints.ADAPTER_FILE))


def drop(part: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a base": (lambda f: change_contract(f, base_weights="0" * 64), "another base .* only adapters of one base"),
    "prompts": (
        lambda f: change_contract(f, prompts={p: {"system": "S", "answer": ""} for p in ("document", "query")}
                                  | {"reasoning": {"system": "R", "answer": ""}}),
        "another prompts",
    ),
    "pooling": (lambda f: change_contract(f, pooling="mean"), "another pooling"),
    "layers": (lambda f: change_tensors(f, drop("v_proj")), r"adapts other layers .*\(2 differ.*target_modules"),
    "rows": (lambda f: change_tensors(f, drop("trainable_tokens")), "trained other rows"),
    "half a pair": (lambda f: change_tensors(f, drop("v_proj.lora_B")), "do not belong together"),
    "a false rank": (lambda f: change_settings(f, r=3), "do not belong together"),
    "more": (lambda f: change_tensors(f, lambda t: t.update(norm=torch.ones(2))), "also trained norm;"),
    "dora": (lambda f: change_settings(f, use_dora=True), "use_dora = True; only plain LoRA can be averaged"),
    "another method": (lambda f: change_settings(f, peft_type="IA3"), "peft_type = 'IA3'; only plain LoRA"),
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), "cannot be read as a LoRA's settings"),
    "no weights": (lambda f: (f / checkpoints.ADAPTER_FILE).unlink(), "has no adapter_model"),
    "damaged": (
        lambda f: (f / checkpoints.ADAPTER_FILE).write_bytes(b"\0" * 100), "damaged"
    ),
    "false weights": (lambda f: change_contract(f, adapter_weights="0" * 64), "do not match the contract"),
    "no contract": (lambda f: (f / checkpoints.CONTRACT_FILE).unlink(), "no contract"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILED)
def test_what_cannot_be_averaged_is_said_in_one_line(what, pair, copied, tmp_path):
    spoil, message = SPOILED[what]
    spoil(copied)
    with pytest.raises(InputError, match=message) as refused:
        average_adapters([pair[0], copied], tmp_path / "soup")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "soup").exists()


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {}, "at least two adapters"),
        (2, {"weights": [1]}, "1 weights for 2 adapters"),
        (2, {"weights": [1, 0]}, "a weight is 0"),
        (2, {"weights": [1, float("nan")]}, "a weight is nan"),
        (2, {"rank": 5}, "rank is 5; expected from 1 to 4"),
        (2, {"rank": 0}, "rank is 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(pair, tmp_path, count, options, message):
    with pytest.raises(InputError, match=message):
        average_adapters(pair[:count], tmp_path / "soup", **options)


def test_an_adapter_given_twice_and_a_merged_model_are_refused(pair, tiny_model, tmp_path):
    with pytest.raises(InputError, match=r"given twice; .*--weights"):
        average_adapters([pair[0], pair[0]], tmp_path / "soup")
    with pytest.raises(InputError, match="no contract"):
        average_adapters([pair[0], tiny_model], tmp_path / "soup")


def test_nothing_is_overwritten(pair, tmp_path):
    before = {path: path.read_bytes() for folder in pair for path in folder.iterdir()}
    for into in (pair[1], tmp_path):
        with pytest.raises(InputError, match="exists already, and is not overwritten"):
            average_adapters(pair, into)
    average_adapters(pair, tmp_path / "soup")
    assert {path: path.read_bytes() for folder in pair for path in folder.iterdir()} == before


def write_dev_set(root: Path) -> None:
    """A data set that has the name and the split of a dev pool."""
    (root / "cosqa" / "qrels").mkdir(parents=True)
    texts = ["read a file", "mean of values", "capital of Germany", "heart attack"]
    for name, word in (("corpus", "document"), ("queries", "query")):
        lines = [{"_id": str(i), "title": "", "text": f"{word} {text}"} for i, text in enumerate(texts)]
        (root / "cosqa" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = "".join(f"{i}\t{i}\t1\n" for i in range(len(texts)))
    (root / "cosqa" / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)


def test_the_command_compares_each_adapter_and_the_average_on_dev(pair, tmp_path, capsys):
    write_dev_set(tmp_path / "data")
    names = list(map(str, pair))
    given = ["--dev", "cosqa", "--data", str(tmp_path / "data"), "--device", "cpu", "--weights", "1,3"]
    assert main(["train", "average", *names, "--into", str(tmp_path / "soup"), *given, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["weights"] == dict(zip(names, [0.25, 0.75], strict=True))
    assert list(record["dev"]) == [*names, str(tmp_path / "soup")]
    figures = {name: found["cosqa.dev"] for name, found in record["dev"].items()}
    assert all(0 < figure <= 1 for figure in figures.values())
    assert figures[record["best"]] == max(figures.values())
    assert main(["train", "average", *names, "--into", str(tmp_path / "again"), *given]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"adapter: {tmp_path / 'again'} (rank 2 of 4, ")
    assert [line.split()[-1] for line in shown[2:5]] == [*names, str(tmp_path / "again")]
    assert shown[5] == f"best on dev: {record['best']}".replace("soup", "again")


@pytest.mark.parametrize(
    ("given", "message"),
    [(["--dev", "nothing"], "nothing"), (["--weights", "1,x"], "--weights 1,x: expected numbers")],
)
def test_the_command_refuses_bad_options_before_it_writes(pair, tmp_path, capsys, given, message):
    assert main(["train", "average", *map(str, pair), "--into", str(tmp_path / "soup"), *given]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "soup").exists()


class TestQueryAdapters:
    @pytest.fixture
    def query_adapters(self, pair: list[Path], tmp_path: Path) -> list[Path]:
        """Two query adapters for the documents of the first adapter, with the weights of both adapters."""
        made = []
        for number, folder in enumerate(pair):
            loaded = checkpoints.load(folder, dtype=torch.float32, merge=False)
            contract = checkpoints.load(pair[0], dtype=torch.float32).contract
            made.append(tmp_path / f"queries-{number}")
            checkpoints.save_query_adapter(loaded.model, contract, ("a", str(pair[0])), made[-1])
        return made

    def test_their_average_is_a_query_adapter_of_the_same_documents(self, pair, query_adapters, tmp_path):
        average_adapters(query_adapters, tmp_path / "soup")
        average_adapters(pair, tmp_path / "plain")
        folders = tmp_path / "soup", tmp_path / "plain", pair[0]
        soup, plain, first = (SearchR3.from_pretrained(folder, device="cpu") for folder in folders)
        assert soup.contract.query_weights
        assert soup.contract.document_space == first.contract.document_space
        assert np.array_equal(soup.encode_document(TEXTS), first.encode_document(TEXTS))
        expected = plain.encode_query(TEXTS, reasoning=False)
        assert np.allclose(soup.encode_query(TEXTS, reasoning=False), expected, atol=1e-6)

    def test_the_adapter_of_their_documents_may_be_averaged_too(self, pair, query_adapters, tmp_path):
        average_adapters([pair[0], query_adapters[1]], tmp_path / "soup", weights=[1, 3])
        average_adapters(query_adapters, tmp_path / "same", weights=[1, 3])
        soup, same = (SearchR3.from_pretrained(tmp_path / name, device="cpu") for name in ("soup", "same"))
        assert soup.contract.query_weights == same.contract.query_weights

    def test_one_of_other_documents_is_refused(self, pair, query_adapters, tmp_path):
        with pytest.raises(InputError, match="belongs to other documents than the query adapter"):
            average_adapters([query_adapters[0], pair[1]], tmp_path / "soup")


def test_an_adapter_may_lack_a_conversation_of_the_first_whose_contract_is_kept(pair, copied, tmp_path):
    record = json.loads((copied / checkpoints.CONTRACT_FILE).read_text())
    latent = {"system": "L", "answer": "", "steps": 2}
    change_contract(copied, prompts=record["contract"]["prompts"] | {"latent": latent})
    average_adapters([copied, pair[0]], tmp_path / "soup")
    assert SearchR3.from_pretrained(tmp_path / "soup", device="cpu").latent_steps == 2
    with pytest.raises(InputError, match="another prompts"):
        average_adapters([pair[0], copied], tmp_path / "other")
