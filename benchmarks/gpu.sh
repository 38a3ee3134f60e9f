#!/usr/bin/env bash
# Speed, time per step and peak memory on a GPU (meant for an H200), compared with nanoGPT; the effect of each choice; the
# time by kind of work. Untested.
# benchmarks/gpu.sh NANOGPT_FOLDER [OUT_FOLDER]    about 20 minutes, most of them compiling
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nanogpt=${1:?usage: benchmarks/gpu.sh NANOGPT_FOLDER [OUT_FOLDER]}
out=${2:-bench_log/gpu}
python=${PYTHON:-python}
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"

try() { # NAME COMMAND...: if one fails, the others still run
    local name=$1
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$out/$name.txt" || echo "== $name failed"
}

nvidia-smi | tee "$out/machine.txt"
# the tests that need a GPU
try tests "$python" -m pytest -q -m gpu src/llm_from_scratch/tests

# 124M in bfloat16, 64 x 1024, optimizer included, tokens/s; and the full size of shakespeare_char, ms/step
try speed "$python" benchmarks/throughput.py --nanogpt="$nanogpt" --cases=cuda-gpt2,cuda-char \
    --contenders=ours,nanogpt --rounds=5 --turn=5
try memory "$python" benchmarks/memory.py --nanogpt="$nanogpt" --case=cuda-gpt2 --steps=5

# the effect of each choice
for setting in cuda_graphs=False data_on_device=False compile=False; do
    try "char-$setting" "$python" benchmarks/throughput.py --cases=cuda-char --contenders=ours --turn=3 "--$setting"
done
for setting in data_on_device=False chunked_loss=False fp8=True cuda_graphs=True optimizer_type=muon; do
    try "gpt2-$setting" "$python" benchmarks/throughput.py --cases=cuda-gpt2 --contenders=ours --turn=5 "--$setting"
done
wide=(--device=cuda --batch_size=16 --n_layer=24 --n_head=16 --n_embd=2048 --json=True)
for fp8 in False True; do
    try "wide-fp8-$fp8" "$python" bench.py "${wide[@]}" --fp8=$fp8
done

# the time by kind of work; each trace is written to the same place, so it is moved
for case in "gpt2 --batch_size=64" "char --batch_size=64 --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --vocab_size=65 --dropout=0.2"; do
    read -r name settings <<<"$case"
    # shellcheck disable=SC2086  # words
    try "profile-$name" "$python" bench.py --device=cuda --profile=True --grad_clip=1 $settings
    mv bench_log/trace.json "$out/trace-$name.json"
done
echo "== results are in $out"
