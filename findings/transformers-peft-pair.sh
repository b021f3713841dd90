#!/bin/sh
# transformers 5.24.0 with peft 0.21.2: `model.add_adapter(...)` raises, though pip installs the pair without a word.
#
# Expected: a released transformers works with the newest PEFT that its own metadata allows; it names no lower bound.
# Seen: add_adapter (and load_adapter) want PEFT 0.22.0 or later, which was not released when 5.24.0 was (2026-11):
#   ValueError: The version of PEFT you are using is not compatible, please use a version >= 0.22.0
# `peft.get_peft_model(model, config)` works with the same two versions.
#
# In Search-R3: pyproject.toml excludes 5.24, and the versions that were tested are in constraints.txt (tests/test_constraints.py).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check transformers==5.24.0 peft==0.21.2
"$work/venv/bin/python" - <<'PYTHON'
import sys

from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def tiny():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
get_peft_model(tiny(), lora)
try:
    tiny().add_adapter(lora)
except Exception as error:
    print(f"{type(error).__name__}: {str(error)[:200]}")
    if "PEFT" not in str(error) and "peft" not in str(error):
        sys.exit("changed")
    print("as described")
else:
    sys.exit("changed: add_adapter works")
PYTHON
