#!/bin/sh
# trl 1.16.0: a folder called "vllm" on Python's path, without any code, makes `trl.GRPOTrainer` impossible to import.
#
# Expected: whether vLLM is installed is asked of the installed packages, or of an import of it.
# Seen: TRL asks whether something called vllm can be found; a folder of that name (of tests, of results) on the path is a namespace
# package, so it can; its version is then read as "N/A", which packaging refuses:
#   InvalidVersion: Invalid version: 'N/A'
# pytest puts each folder of tests on the path, so tests/engines/test_a.py is enough, if there is a tests/engines/vllm beside it.
#
# In Search-R3: no folder of tests is called like a package that others look for (tests/model/engines, tests/training).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check trl==1.16.0 transformers==5.23.0
mkdir -p "$work/tests/vllm"
cat > "$work/ask.py" <<'PYTHON'
try:
    from trl.import_utils import is_vllm_available

    print(f"is_vllm_available() is {is_vllm_available()}")
except Exception as error:
    print(f"{type(error).__name__}: {error}")
PYTHON
without=$("$work/venv/bin/python" "$work/ask.py" 2>/dev/null)
with=$(PYTHONPATH="$work/tests" "$work/venv/bin/python" "$work/ask.py" 2>/dev/null)
echo "without the folder: $without"
echo "with it:            $with"
case "$without/$with" in
"is_vllm_available() is False/InvalidVersion"*) echo "as described" ;;
*)
    echo "changed"
    exit 1
    ;;
esac
