"""Fixtures that several rooms' tests share: a tiny random model of a real architecture, saved as a real model folder; a
browser and an accessibility check.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from crashed_workers import pytest_xdist_make_scheduler  # noqa: F401, a hook
from storage_faults import s3_bucket, s3_variables

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network for anything
_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
if _DATA.is_dir():  # as in the Makefile: real data sets beside the checkout
    os.environ.setdefault("SEARCH_R3_DATA", str(_DATA))

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENIZER_TEXT = [
    "Please represent user queries. Please represent documents. The embedding is what the hidden state holds.",
    "system user assistant: first enrich the query in a few words, its core concepts and how they relate.",
    "How do I read a file line by line in Python? Open it and iterate over the lines.",
    "def mean(values):\n    return sum(values) / len(values)",
    "Die Hauptstadt von Frankreich ist Paris. Aspirin lowers the risk of heart attack.",
]


def save_tiny_model(folder: Path, seed: int = 0, *, chat_template: bool = True) -> Path:
    """Write a random two-layer Llama (hidden size 32) with a byte-level BPE tokenizer to `folder`; returns `folder`.

    The vocabulary is not a multiple of 64 and the embeddings are tied, as in the models that we really use.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TOKENIZER_TEXT,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                initializer_range=0.2,
                bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LONGEST = (
    "index/test_index_small_writes.py",
    "training/grpo/test_grpo_task.py",
    "training/sft/test_sft_task.py",
    "server/test_server_schemathesis.py",
    "server/test_server_large.py",
    "index/backends/lance/test_index_columns.py",
    "server/test_server_write_faults.py",
    "model/test_tokenization_long.py",
    "training/grpo/test_grpo_resume.py",
    "server/test_server_storage.py",
    "evaluation/rollouts/test_rollout_measurement.py",
    "test_containers.py",
    "test_bad_input.py",
    "index/storage/test_index_lease.py",
    "index/storage/test_index_storage_faults.py",
    "training/test_plot.py",
    "training/sft/test_sft_distributed.py",
    "test_cli.py",
    "model/test_real.py",
    "index/storage/test_index_storage.py",
    "test_first_steps.py",
    "server/test_server_cli.py",
)
"""The files that take longest, about in that order. `make test` hands whole files to its processes and begins with
these, or one of them would be left with such a file when the others are done."""


@pytest.hookimpl(tryfirst=True)  # before pytest selects by `-m`
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that use the fixture `browser` get the marker of that name, those marked `nightly` are `slow` too, and the
    files of `LONGEST` come first.
    """
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.slow)
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    if lost := [str(path) for path in places if not path.is_file()]:
        raise pytest.UsageError(f"LONGEST in {__file__} names files that are not there: {', '.join(lost)}")
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that `SearchR3.from_pretrained` reads in milliseconds; random weights, real architecture."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> Any:
    """`tiny_model`, loaded: a `SearchR3`."""
    from search_r3 import SearchR3

    return SearchR3.from_pretrained(tiny_model, device="cpu")


@pytest.fixture(scope="session")
def tiny_cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random cross-encoder that reads 48 tokens."""
    from cross_encoders import save_cross_encoder

    return save_cross_encoder(tmp_path_factory.mktemp("rerankers") / "tiny-cross-encoder")


@pytest.fixture(scope="session")
def other_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_model`, with other weights: another checkpoint of the same shape."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "other-llama", seed=1)


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., Path]:
    """`save_tiny_model(folder, seed=0, *, chat_template=True)`, for tests that need a model with something wrong."""
    return save_tiny_model


@pytest.fixture(scope="session")
def save_adapter() -> Callable[..., Path]:
    """Write a random adapter (LoRA on all linear layers plus the embed token's row) with golden vectors."""

    def save(base: Path, folder: Path, seed: int = 0) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model

        from search_r3 import SearchR3
        from search_r3.model import checkpoint

        loaded = checkpoint.load_base(base, dtype=torch.float32)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            settings = LoraConfig(
                r=2,
                target_modules="all-linear",
                init_lora_weights=False,
                trainable_token_indices=[loaded.contract.embed_token_id],
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(loaded.model, settings)
            for name, weight in model.named_parameters():
                if "trainable_tokens_delta" in name:
                    torch.nn.init.normal_(weight, std=0.5)
        checkpoint.save_adapter(model, loaded.contract, folder)
        SearchR3.from_pretrained(folder, device="cpu").write_golden(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def save_query_adapter() -> Callable[..., Path]:
    """Write a query adapter with golden vectors: an adapter, with other weights, for queries of its documents."""

    def save(adapter: Path, folder: Path, seed: int = 1) -> Path:
        import torch

        from search_r3 import SearchR3
        from search_r3.model import checkpoint

        loaded = checkpoint.load(adapter, dtype=torch.float32, merge=False)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            for name, weight in loaded.model.named_parameters():
                if "lora_" in name or "trainable_tokens_delta" in name:
                    weight.add_(0.3 * torch.randn_like(weight))
        checkpoint.save_query_adapter(loaded.model, loaded.contract, (loaded.name, str(adapter)), folder)
        SearchR3.from_pretrained(folder, device="cpu").write_golden(folder)
        return folder

    return save


@pytest.fixture(scope="module")  # no longer: the loop that Playwright runs would be in the way of other tests' own
def browser() -> Iterator[Any]:
    """A Chromium: $CHROMIUM, one on the path, or Playwright's own."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    place = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=place, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no browser: apt install chromium, or playwright install chromium ({str(error)[:80]})")
        yield found
        found.close()


@pytest.fixture
def barriers() -> Callable[[Any], list[tuple[str, str]]]:
    """`barriers(page)`: what axe calls serious or critical in a page of `browser`, each with the first element."""
    pytest.importorskip("axe_playwright_python", reason="no axe: pip install axe-playwright-python")
    from axe_playwright_python.sync_playwright import Axe

    def find(page: Any) -> list[tuple[str, str]]:
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        return [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]

    return find


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a local server that speaks S3 (moto's), with one bucket, called "bucket"."""
    pytest.importorskip("moto.server", reason="moto is not installed: pip install 'search-r3[dev]'")
    with s3_bucket() as url:
        yield url


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The usual variables, for that server."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_variables(s3_server).items():
        monkeypatch.setenv(name, value)
    return monkeypatch
