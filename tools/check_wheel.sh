#!/bin/sh
# Install one wheel or sdist in a fresh environment and use it as a user would: sh tools/check_wheel.sh dist/peftplan-*.whl
set -eu

file=$(realpath "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "$file"
"$folder/venv/bin/pip" check
cd "$folder"
unset PYTHONPATH # no checkout beside it

PATH="$folder/venv/bin:$PATH"
peftplan --version
peftplan estimate llama-2-70b --method qlora --r 16 --gpu a100-80gb --require-fit
peftplan estimate qwen3-8b --gpu rtx-4090 --format json | python -m json.tool > /dev/null
peftplan fit llama-3.2-1b --gpu t4 --methods qlora > /dev/null
peftplan serve llama-3.2-1b > /dev/null
peftplan schema estimate > /dev/null
python - << 'CHECK'
import importlib.util
import sys

import peftplan

assert peftplan.__file__.startswith(sys.prefix), f"{peftplan.__file__} is not what was installed"
assert peftplan.estimate("llama-2-70b", method="qlora", r=16).trainable_parameters == 207_093_760
heavy = [name for name in ("torch", "transformers", "numpy", "matplotlib") if importlib.util.find_spec(name)]
assert not heavy, f"the base install brings {heavy}"
replay = importlib.util.find_spec("peftplan.allocator._replay")
print("compiled replay" if replay else "replay in Python", "in", peftplan.__file__)
CHECK
