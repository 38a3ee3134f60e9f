#!/bin/bash
# Measures every figure of the table at the top of README.md on this machine: about 15 minutes on two idle cores.
#
#   benchmarks/proof.sh [DIR]
#
# DIR is a checkout of nanoGPT, by default build/nanoGPT, which is cloned if it is missing. Python is .venv's, or $PYTHON.
# Prints the processor, the versions, and one table for each row.
set -euo pipefail
cd "$(dirname "$0")/.."
nanogpt=${1:-build/nanoGPT}
python=${PYTHON:-.venv/bin/python}
[ -d "$nanogpt" ] || git clone --quiet --depth 1 https://github.com/karpathy/nanoGPT "$nanogpt"
[ -f "$nanogpt/data/shakespeare_char/train.bin" ] || "$python" "$nanogpt/data/shakespeare_char/prepare.py"

row() { printf '\n# %s\n$ %s\n' "$1" "${*:2}"; "${@:2}"; }

date +%F
"$python" -c "import platform, torch; print('Python', platform.python_version(), 'torch', torch.__version__)"
row "time to nanoGPT's loss" "$python" benchmarks/time_to_loss.py --nanogpt="$nanogpt"
row "decoding" "$python" benchmarks/decoding.py --nanogpt="$nanogpt" --cases=char-512 --rounds=3
row "memory to train GPT-2 124M" "$python" benchmarks/memory.py --nanogpt="$nanogpt" --rounds=1
row "killed and resumed" "$python" -m llm_from_scratch.tests.faults.storm cuts kills --share=0.05
