#!/bin/sh
# safetensors 0.8.0 with torch 2.13.0 on Linux: memory of a weight that was changed and then thrown away is not given back.
#
# Expected: `load_file` returns tensors of their own, so deleting one frees its memory, whatever happens to the others.
# Seen: all tensors of a file are views of one private mapping of it. Changing one in place copies its pages; they belong to the mapping,
# so they stay in memory after the tensor is gone, for as long as any other tensor of the file lives: 256 MB are changed and deleted, a
# tensor of four bytes is kept, and the process still holds the 256 MB. Each tensor's storage says that it is no larger than the tensor, so nothing
# in Python shows it. Once the small tensor is deleted too, the memory is free.
#
# In Search-R3: merging an adapter changes nearly all weights in place, and joining projections replaces them; 400 MB of a model of
# 135 million parameters were held twice (`search_r3/model/checkpoint.py`, tests/model/test_checkpoint.py).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cat > "$work/held.py" <<'PYTHON'
import sys

import torch
from safetensors.torch import load_file, save_file

file = sys.argv[1]
save_file({"large": torch.zeros(64 * 2**20), "small": torch.zeros(1)}, file)


def held():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


before = held()
weights = load_file(file)
weights["large"] += 1
assert weights["large"].untyped_storage().nbytes() == weights["large"].nbytes
del weights["large"]
with_small = held() - before
del weights["small"]
without = held() - before
print(f"with the small tensor {'held' if with_small > 200 else 'free'}, without {'held' if without > 200 else 'free'}")
PYTHON
found=$("$work/venv/bin/python" "$work/held.py" "$work/weights.safetensors")
echo "$found"
case "$found" in
"with the small tensor held, without free") echo "as described" ;;
*)
    echo "changed"
    exit 1
    ;;
esac
