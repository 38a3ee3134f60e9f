#!/usr/bin/env bash
# The GPU figures, for a machine with one (an H200 is what they are meant for): speed, time per step and peak memory
# beside nanoGPT, what each choice is worth, and where the time goes. Nobody has run it yet.
# benchmarks/gpu.sh NANOGPT_FOLDER [OUT_FOLDER]    about 20 minutes, most of them compiling
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nanogpt=${1:?usage: benchmarks/gpu.sh NANOGPT_FOLDER [OUT_FOLDER]}
out=${2:-bench_log/gpu}
python=${PYTHON:-python}
export PYTHONPATH=$PWD/src${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"

try() { # NAME COMMAND...: one that fails does not end the others
    local name=$1
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$out/$name.txt" || echo "== $name failed"
}

nvidia-smi | tee "$out/machine.txt"
# is it right? The tests that need a GPU, the one that no step waits for it among them
try tests "$python" -m pytest -q -m gpu src/llm_from_scratch/tests

# 124M in bfloat16, 64 x 1024, optimizer included, tokens/s; and the full size of shakespeare_char, ms/step
try speed "$python" benchmarks/throughput.py --nanogpt="$nanogpt" --cases=cuda-gpt2,cuda-char \
    --contenders=ours,nanogpt --rounds=5 --turn=5
try memory "$python" benchmarks/memory.py --nanogpt="$nanogpt" --case=cuda-gpt2 --steps=5

# what each choice is worth
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

# where the time goes; the traces are written to one place, so each is moved
for case in "gpt2 --batch_size=64" "char --batch_size=64 --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --vocab_size=65 --dropout=0.2"; do
    read -r name settings <<<"$case"
    # shellcheck disable=SC2086  # words
    try "profile-$name" "$python" bench.py --device=cuda --profile=True --grad_clip=1 $settings
    mv bench_log/trace.json "$out/trace-$name.json"
done
echo "== all of it is in $out"
