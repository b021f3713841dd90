#!/bin/sh
# langchain-core 1.8.3 brings langsmith 0.15.1, and that a pytest plugin: every pytest process loads all of langsmith.
#
# Expected: a library that is installed beside pytest costs tests nothing that do not import it.
# Seen: langsmith registers an entry point of the group pytest11, so pytest imports it at each start, in each xdist worker, whatever
# is tested, and rewrites the assertions of its modules as it does for every plugin. Printed when this was written:
#   with it:    modules of langsmith: 227, CPU seconds: 2.2
#   without it: modules of langsmith: 0, CPU seconds: 0.6
#
# In Search-R3: the tests run with `-p no:langsmith_plugin` (pyproject.toml).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check pytest==9.2.0 langchain-core==1.8.3 langsmith==0.15.1
mkdir "$work/tests"
cat > "$work/tests/test_nothing.py" <<'PYTHON'
import os
import sys


def test_nothing():
    loaded = sum(name.split(".")[0] == "langsmith" for name in sys.modules)
    times = os.times()
    print(f"\nmodules of langsmith: {loaded}, CPU seconds: {times.user + times.system:.1f}")
    with open(os.environ["FOUND"], "w") as found:
        found.write(str(loaded))
PYTHON
cd "$work/tests"
FOUND="$work/with" "$work/venv/bin/python" -m pytest -q -s test_nothing.py
FOUND="$work/without" "$work/venv/bin/python" -m pytest -q -s -p no:langsmith_plugin test_nothing.py
if [ "$(cat "$work/with")" -gt 100 ] && [ "$(cat "$work/without")" -eq 0 ]; then
    echo "as described"
else
    echo "changed"
    exit 1
fi
