#!/bin/bash
# Measures every figure of the table at the top of README.md on this machine: about 15 minutes on two idle cores, after the
# installation of the others.
#
#   benchmarks/proof.sh [NANOGPT]
#
# NANOGPT is a checkout of nanoGPT, by default build/nanoGPT, which is cloned if it is missing. Python is .venv's, with
# the extra dev, which is installed if it is missing; or $PYTHON. litgpt, and llama.cpp as xllamacpp, are installed into
# build/peers, in environments of their own. ROUNDS makes a quick trial: ROUNDS=1 benchmarks/proof.sh
#
# Prints the processor, the versions and the output of each command, and last the table for README.md. The same is in
# build/proof. `.venv/bin/python benchmarks/proof_table.py --write` puts the table into README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
nanogpt=${1:-build/nanoGPT}
python=${PYTHON:-.venv/bin/python}
steps=${STEPS:-1} # after a first one: the peak is reached in the second step, that of transformers within 2%

[ -n "${PYTHON:-}" ] || ./just install-dev
[ -d "$nanogpt" ] || git clone --quiet --depth 1 https://github.com/karpathy/nanoGPT "$nanogpt"
[ -f "$nanogpt/data/shakespeare_char/train.bin" ] || "$python" "$nanogpt/data/shakespeare_char/prepare.py"

peer() { # NAME PACKAGE...: an environment on top of $python's, made once
    local place=build/peers/$1
    [ ! -f "$place/done" ] || return 0
    "$python" -m venv --clear "$place"
    "$python" -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
        >"$(echo "$place"/lib/python*/site-packages)/below.pth"
    "$place/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}"
    touch "$place/done"
}
peer litgpt litgpt==0.5.13 'transformers>=4.51.3,<4.57'
peer llamacpp xllamacpp==2026.10.11549 gguf==0.19.0

mkdir -p build/proof
rm -f build/proof/*
row() { # NAME COMMAND...: the output goes to build/proof/NAME.txt too
    printf '\n# %s\n$ %s\n' "$1" "${*:2}"
    "${@:2}" 2>&1 | tee "build/proof/$1.txt"
}

date +%F | tee build/proof/date
"$python" -c "import platform, torch; print('Python', platform.python_version(), 'torch', torch.__version__)"
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
peers=(--nanogpt="$nanogpt" --litgpt=build/peers/litgpt/bin/python)
row loss "$python" benchmarks/time_to_loss.py --nanogpt="$nanogpt"
row training "$python" benchmarks/throughput.py "${peers[@]}" --cases=gpt2 \
    --contenders=ours,nanogpt,transformers,litgpt --rounds="${ROUNDS:-2}"
row decoding build/peers/llamacpp/bin/python benchmarks/decoding.py "${peers[@]}" \
    --cases=char-512,gpt2-fp32,gpt2-int8 --no-variants --rounds="${ROUNDS:-3}"
# Peak memory and equal weights do not depend on the load, so these run side by side. The speeds of memory.py do.
row resume "$python" benchmarks/resume.py --nanogpt="$nanogpt" >build/proof/resume.log &
trap 'kill $! 2>/dev/null || true' EXIT # if memory.py fails
row memory "$python" benchmarks/memory.py "${peers[@]}" --steps="$steps"
status=0 && wait $! || status=$?
cat build/proof/resume.log
[ "$status" = 0 ]
echo
"$python" benchmarks/proof_table.py
