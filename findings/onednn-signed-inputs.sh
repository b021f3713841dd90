#!/bin/sh
# torch 2.13.0 (oneDNN 3.12.0) on a processor with AVX-512 VNNI but without AMX: a quantized linear layer whose inputs are int8 runs in
# oneDNN's reference code.
#
# Expected: `torch.ops.onednn.qlinear_pointwise` accepts int8 and uint8 inputs, so both run at VNNI's speed, or int8 is refused.
# Seen: with int8 inputs, oneDNN picks the implementation `ref_int8`: the same numbers, hundreds to ten thousand times slower
# (32 x 576 by 576 x 1536: 500 to 900 ms instead of 0.1 ms on an AMD EPYC with two cores). With uint8 inputs and 128 as their zero point, it is
# a `brg` kernel. On a processor with AMX both are fast, so a test there sees nothing. ONEDNN_MAX_CPU_ISA leaves AMX out, so that this
# script shows the same on every processor with VNNI.
#
# In Search-R3: the engine `int8` seemed to hang on AMD processors. It shifts its inputs to be unsigned where there is no AMX
# (search_r3/model/engines/int8/int8_weights.py, tests/model/engines/int8/test_int8_weights.py).
set -eu
grep -q avx512_vnni /proc/cpuinfo || { echo "needs a processor with AVX-512 VNNI"; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$work/multiply.py" <<'PYTHON'
import sys

import torch

weight = torch.ones(64, 64, dtype=torch.int8)
packed = torch.ops.onednn.qlinear_prepack(weight, None)
scale, zeros = torch.ones(64), torch.zeros(64, dtype=torch.long)
dtype, zero = (torch.int8, 0) if sys.argv[1] == "int8" else (torch.uint8, 128)
inputs = torch.full((8, 64), 3 + zero, dtype=dtype)
out = torch.ops.onednn.qlinear_pointwise(
    inputs, 1.0, zero, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
)
assert (out == 3 * 64).all()
PYTHON
kernel() {
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI ONEDNN_VERBOSE=1 "$work/venv/bin/python" "$work/multiply.py" "$1" |
        grep ',exec,cpu,matmul,' | cut -d, -f7 | cut -d: -f1 | head -n 1
}
found="int8: $(kernel int8), uint8: $(kernel uint8)"
echo "$found"
case "$found" in
"int8: ref_int8, uint8: brg"*) echo "as described" ;;
*)
    echo "changed"
    exit 1
    ;;
esac
