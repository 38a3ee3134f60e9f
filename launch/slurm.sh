#!/bin/bash
# Trains on Slurm until the run is complete: saves before the time limit, requeues itself, and resumes.
#
#   sbatch --nodes=4 --gpus-per-node=8 launch/slurm.sh gpt2-124m --out_dir=out
#
# Give --out_dir on the command line: a failed run is queued again only if it has saved a new checkpoint there.
# --signal: two minutes before the time limit, or if the job is preempted, this script gets SIGTERM and passes it on.
#SBATCH --job-name=gpt --ntasks-per-node=1 --time=12:00:00 --signal=B:TERM@120 --requeue --open-mode=append
#SBATCH --output=slurm-%j.txt

out=out last=
for word; do
    case $word in
        --out_dir=*) out=${word#*=} ;;
        *) [ "$last" = --out_dir ] && out=$word ;;
    esac
    last=$word
done
newest() { find "$out/" -maxdepth 1 -name 'step-*' 2>/dev/null | sort -V | tail -n 1; }
before=$(newest)

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=0 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$first:${PORT:-29500}" --max-restarts=3 \
    -m llm_from_scratch.cli.train --init_from=auto "$@" &
training=$! told=

stop() { # srun passes the signal to torchrun, and torchrun to the processes
    told=yes
    kill -TERM "$training"
}
trap stop TERM
until wait "$training"; code=$?; ! kill -0 "$training" 2>/dev/null; do :; done # a trapped signal ends `wait` early

[ "$code" -eq 0 ] && exit 0
if [ -z "$told" ] && [ "$(newest)" = "$before" ]; then
    echo "the run failed without a new checkpoint in $out: not queued again"
    exit "$code"
fi
if [ "${SLURM_RESTART_COUNT:-0}" -ge 100 ]; then
    echo "the run was queued 100 times: not queued again"
    exit "$code"
fi
scontrol requeue "$SLURM_JOB_ID"
