#!/usr/bin/env bash
# A run on the nodes of a Slurm job: Ray's head and the driver on the first one, workers on all of them.
#
#   sbatch --nodes 4 --cpus-per-task 8 --gpus-per-node 1 --time 4:00:00 deploy/slurm.sh JOB --output /shared/runs/NAME
#
# What follows the script goes to `riskforge run`. `riskforge` and `ray` are on the PATH that sbatch is called with, and
# job file, environment and output on file systems that all nodes share. 120 s before the time limit the run drains and
# ends with exit code 75; the job is then requeued, and continues when it is its turn. So does one that was preempted.
#
# RISKFORGE_HEAD_IP: address of the first node, if its first one (`hostname -I`) is not what the others reach it by.
#
#SBATCH --job-name=riskforge
#SBATCH --output=riskforge-%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# The loss of a node is not that of the others.
#SBATCH --no-kill
set -uo pipefail

# Another job may run on a node, and one of another user: ports, folder and token are those of this job alone.
port=$((20000 + 4 * (SLURM_JOB_ID % 3000)))
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN
unset RAY_ADDRESS
folder="/tmp/rf-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
cores=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
head_ip=${RISKFORGE_HEAD_IP:-$(hostname -I | cut -d ' ' -f 1)}
# At 0, Ray keeps the loopback address and no node joins; else it replaces that address by another one. Whoever calls
# sbatch may have set it.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1
if [ "$SLURM_JOB_NUM_NODES" -eq 1 ]; then
  # Then nothing listens to the network.
  head_ip=127.0.0.1
  export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
fi

# Ray on one node, until it gets a signal. Its folder lets everybody in, so it lies inside one that does not.
start_ray() {
  local folder=$1 ray
  shift
  mkdir -m 700 "$folder" || return
  ray start --temp-dir="$folder/r" --min-worker-port=0 --max-worker-port=0 --block "$@" &
  ray=$!
  trap 'kill "$ray"' TERM
  while kill -0 "$ray" 2>/dev/null; do wait "$ray"; done
  rm -rf "$folder"
}

# The same on a further node, again until it is told to end: one that does not get up in time is not lost.
# shellcheck disable=SC2329  # By srun.
join_ray() {
  while :; do
    start_ray "$@" &
    trap 'kill "$!"; wait "$!"; exit' TERM
    wait "$!"
    sleep 2
  done
}

start_ray "$folder" --head --node-ip-address="$head_ip" --port="$port" --num-cpus="$cores" \
  --ray-client-server-port=$((port + 1)) --dashboard-agent-listen-port=$((port + 2)) \
  --metrics-export-port=$((port + 3)) --include-dashboard=false --disable-usage-stats &
processes=($!)
# Ray writes this file when the head is up.
until [ -e "$folder/r/ray_current_cluster" ]; do
  kill -0 "${processes[0]}" 2>/dev/null || exit 1
  sleep 0.5
done

if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  others=$((SLURM_JOB_NUM_NODES - 1))
  # shellcheck disable=SC2016
  srun --export=ALL --relative=1 --nodes="$others" --ntasks="$others" --cpus-per-task="$cores" --no-kill \
    --kill-on-bad-exit=0 --wait=0 bash -c "$(declare -f start_ray join_ray)"'; join_ray "$1-$SLURM_NODEID" "${@:2}"' \
    ray "$folder" --address="$head_ip:$port" --num-cpus="$cores" &
  processes+=($!)
fi

riskforge run --address="$head_ip:$port" --executor=ray "$@" &
driver=$!
# Slurm sends the signal to this script alone. A second signal would end the run at once.
trap 'kill -TERM "$driver"; trap "" TERM' TERM
wait "$driver"
while kill -0 "$driver" 2>/dev/null; do wait "$driver"; done
wait "$driver"
code=$?

# The steps of the job, not this script; a signal to srun would kill them at once.
[ "${#processes[@]}" -eq 1 ] || scancel --signal=TERM "$SLURM_JOB_ID"
kill "${processes[0]}" 2>/dev/null
wait "${processes[@]}"
[ "$code" -ne 75 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
