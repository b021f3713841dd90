#!/bin/sh
# pip 26.1 and 26.2: whether PIP_CONSTRAINT also holds for the packages that a source build needs.
#
# Expected: a constraints file that pins setuptools pins it for `pip install .` too, or never does.
# Seen: through the environment variable, pip 26.1 applies it to the isolated build environment; pip 26.2 does not, and
# builds with the newest setuptools. There only PIP_BUILD_CONSTRAINT does, which older pips ignore without a word.
#   pip 26.1, PIP_CONSTRAINT:        built with setuptools 75.0.0
#   pip 26.2, PIP_CONSTRAINT:        built with a newer one
#   pip 26.2, PIP_BUILD_CONSTRAINT:  built with setuptools 75.0.0
#
# In Search-R3: the Makefile sets both (tests/test_constraints.py).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/project"
cat > "$work/project/setup.py" <<'PYTHON'
import setuptools

setuptools.setup(name="built-with", version=setuptools.__version__.split(".post")[0])
PYTHON
echo "setuptools==75.0.0" > "$work/constraints.txt"
built() { # PIP VARIABLE
    python3 -m venv --clear "$work/venv"
    "$work/venv/bin/python" -m pip install -q --disable-pip-version-check "pip==$1"
    env "$2=$work/constraints.txt" "$work/venv/bin/python" -m pip install -q --disable-pip-version-check "$work/project"
    "$work/venv/bin/python" -m pip list --format=freeze | sed -n 's/^built.with==//p'
}
old=$(built 26.1 PIP_CONSTRAINT) new=$(built 26.2 PIP_CONSTRAINT) build=$(built 26.2 PIP_BUILD_CONSTRAINT)
echo "setuptools: pip 26.1 with PIP_CONSTRAINT $old; 26.2 with PIP_CONSTRAINT $new, with PIP_BUILD_CONSTRAINT $build"
[ "$old" = 75.0.0 ] && [ "$new" != 75.0.0 ] && [ "$build" = 75.0.0 ] || { echo changed; exit 1; }
echo "as described"
