#!/bin/sh
# safetensors 0.8.0: save_file ignores the umask (its files are readable for their owner alone), and replaces an existing file by a new one.
#
# Expected: as with open() or numpy.save, a new file has mode 0666 less the umask, and an existing one keeps its mode, its owner and its links.
# Seen: with the umask 022 a new file has mode 600; a file that had mode 664 and a second hard link has mode 600 afterwards, and the other
# link still has the old content. So a model that one user trains in a shared folder cannot be loaded by another user or by a service.
#
# In Search-R3: files written through search_r3/files.py get the mode of any new file (`_use_default_mode`, tests/test_files.py).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cat > "$work/run.py" <<'PYTHON'
import os
import stat
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

os.umask(0o022)
folder = Path(sys.argv[1])


def mode(path: Path) -> str:
    return format(stat.S_IMODE(path.stat().st_mode), "o")


plain, new, old, link = (folder / name for name in ("plain.npy", "new.safetensors", "old.safetensors", "link.safetensors"))
np.save(plain, np.ones(2))
save_file({"x": np.ones(2)}, new)
save_file({"x": np.zeros(2)}, old)
old.chmod(0o664)
os.link(old, link)
save_file({"x": np.ones(2)}, old)
print(f"numpy {mode(plain)}, safetensors {mode(new)}; overwritten: {mode(old)}, its other link has {load_file(link)['x'][0]:.0f}")
PYTHON
found=$("$work/venv/bin/python" "$work/run.py" "$work")
echo "$found"
case "$found" in
"numpy 644, safetensors 600; overwritten: 600, its other link has 0") echo "as described" ;;
*)
    echo "changed"
    exit 1
    ;;
esac
