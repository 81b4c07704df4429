#!/usr/bin/env bash
# lmsat on Slurm: a Ray of this job's nodes, the command in it, and its end with the command's.
#
#   sbatch --nodes=2 clusters/slurm.sh lmsat sweep --grid mine.yaml --out /shared/runs
#
# Submit from the top of the repository, on a file system that all nodes share, after `make
# .venv/ready`. What is wanted of the nodes may be given to sbatch instead.
#SBATCH --job-name=lmsat
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
set -euo pipefail

export PATH="${SLURM_SUBMIT_DIR:?run this with sbatch}/.venv/bin:$PATH"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0
[ -s ~/.ray/auth_token ] || ray get-auth-token --generate > /dev/null

nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
address=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1; exit}')
port=$((20000 + SLURM_JOB_ID % 10000)) # several jobs may share a node
start=(ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --temp-dir="/tmp/ray-$SLURM_JOB_ID")

trap 'trap - EXIT; kill $(jobs -p) 2> /dev/null || true; wait' EXIT
srun --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" "${start[@]}" --head \
    --node-ip-address="$address" --port="$port" \
    --include-dashboard=false --resources='{"head": 1}' &
export RAY_ADDRESS="$address:$port"
alive() { ray status 2> /dev/null | grep -c '^ 1 node_' || true; }
until [ "$(alive)" -ge 1 ]; do sleep 1; jobs %1 > /dev/null; done
if [ "${#nodes[@]}" -gt 1 ]; then
    others=$((${#nodes[@]} - 1))
    srun --overlap --nodes="$others" --ntasks="$others" --exclude="${nodes[0]}" \
        "${start[@]}" --address="$RAY_ADDRESS" &
    until [ "$(alive)" -gt "$others" ]; do sleep 1; jobs %2 > /dev/null; done
fi

# The job's end is announced to this shell alone; lmsat then saves every trial, and goes on from there
# when the same job is submitted again.
"$@" &
command=$!
trap 'kill -TERM "$command"' TERM
while kill -0 "$command" 2> /dev/null; do wait "$command" && status=0 || status=$?; done
exit "$status"
