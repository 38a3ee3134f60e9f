#!/bin/bash
# A run on two hosts, which are network namespaces of this machine (Linux, as root). What follows goes to llm-train:
#   benchmarks/two_hosts.sh quick --dataset=NAME --max_iters=20 --out_dir=out-hosts
# CUT=10 cuts the cable between them after 10 seconds.
set -eu
cd "$(dirname "$0")/.."
tag=gpt$$
clean() {
    kill $(jobs -p) 2>/dev/null || :
    ip netns del "$tag-0" 2>/dev/null || :
    ip netns del "$tag-1" 2>/dev/null || :
}
trap clean EXIT
trap 'exit 143' TERM INT
for node in 0 1; do
    ip netns add "$tag-$node"
    ip -n "$tag-$node" link set lo up
done
ip link add eth0 netns "$tag-0" type veth peer name eth0 netns "$tag-1"
for node in 0 1; do
    ip -n "$tag-$node" address add "10.77.0.$((node + 1))/24" dev eth0
    ip -n "$tag-$node" link set eth0 up
done
for node in 0 1; do
    ip netns exec "$tag-$node" env GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 .venv/bin/python -m torch.distributed.run \
        --nnodes=2 --node_rank=$node --nproc_per_node=1 --master_addr=10.77.0.1 --master_port=29500 \
        -m llm_from_scratch.cli.train --backend=gloo --device=cpu "$@" &
    nodes[$node]=$!
done
[ -z "${CUT:-}" ] || { sleep "$CUT" && ip -n "$tag-0" link set eth0 down; }
begin=$SECONDS
for node in 0 1; do
    code=0
    wait "${nodes[$node]}" || code=$?
    echo "host $node ended with $code after $((SECONDS - begin)) s"
done
