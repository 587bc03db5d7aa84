# shellcheck shell=bash
# Sourced by the *.sbatch files of this folder: the steps of a job, their logs, and what happens when Slurm wants the nodes
# back. docs/slurm.md says how to use it.
#
# One task of a step is one rank, so a rank's exit code and Slurm's signals need no launcher between them. SIGUSR1 comes
# to this script alone (--signal=B:...), which passes it on to the training step.

set -euo pipefail

config=${1:?after the .sbatch file comes CONFIG.toml} # further arguments are megatron-rl's
shift

restarts=${SLURM_RESTART_COUNT:-0}
max_restarts=${MAX_RESTARTS:-100}
gpus=${SLURM_GPUS_PER_NODE:-0}
gpus=${gpus##*:} # of h100:8
ranks=$((gpus > 0 ? gpus : ${SLURM_NTASKS_PER_NODE:-1}))
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
training_step=''
signalled=0

export PATH="${MEGATRON_RL_BIN:-$SLURM_SUBMIT_DIR/.venv/bin}:$PATH"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

say() {
  echo "$(date +%T) job $SLURM_JOB_ID, start $((restarts + 1)): $*"
}

# Ranks save when they get it, and end with 75; with 130 when there is nothing to save yet.
pass_on() {
  signalled=$((signalled + 1))
  say "SIGUSR1: asking the ranks to save and end"
  if [ -n "$training_step" ]; then kill -USR1 "$training_step" 2>/dev/null || true; fi # it may have ended by now
}

# The address by which this cluster reaches a node.
address_of() {
  scontrol --oneliner show node "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}

commas() {
  local IFS=,
  echo "$*"
}

# prepare COMMAND SERVING_NODES: check the configuration, and make the folder for this start's logs.
prepare() {
  local folder plan
  if [ "$restarts" -gt "$max_restarts" ]; then
    say "started again more than $max_restarts times (MAX_RESTARTS); giving up"
    exit 1
  fi
  if [ "$2" -ge "${#nodes[@]}" ]; then
    say "SERVING_NODES=$2 of ${#nodes[@]} nodes leaves none to train; ask for more with sbatch --nodes"
    exit 2
  fi
  plan=$(megatron-rl plan "$config" "${@:3}" --json --gpu-memory-gb 0 --nodes "${#nodes[@]}" --gpus-per-node "$ranks" \
    --serving-nodes "$2")
  folder=$(sed -n 's/^  "run_dir": "\(.*\)",\{0,1\}$/\1/p' <<<"$plan")
  logs=$folder/logs/slurm-$SLURM_JOB_ID.$restarts
  mkdir -p "$logs/servers"
  echo "$plan" >"$logs/plan.json"
  training_nodes=("${nodes[@]:0:${#nodes[@]}-$2}")
  serving_nodes=("${nodes[@]:${#nodes[@]}-$2}")
  # Jobs that share a node need ports of their own.
  export MASTER_PORT="${MASTER_PORT:-$((15000 + (SLURM_JOB_ID + restarts) % 15000))}"
  MASTER_ADDR="${MASTER_ADDR:-$(address_of "${training_nodes[0]}")}"
  export MASTER_ADDR
  say "$1 on ${training_nodes[*]}, $ranks ranks each${serving_nodes:+, serving on ${serving_nodes[*]}}; logs in $logs"
}

# step NAME TASKS_PER_NODE NODES... -- COMMAND...: a step over all of each node's memory and its share of the cores per
# task. --wait: when a rank has ended, the others have so long to end too. They end at once after a clean stop; a rank
# that waits inside of a collective for a dead one ends by this. --kill-on-bad-exit would kill rank 0 at its last words.
step() {
  local name=$1 tasks=$2 on=()
  shift 2
  while [ "$1" != -- ]; do
    on+=("$1")
    shift
  done
  shift
  local cores=$((SLURM_CPUS_ON_NODE / tasks))
  exec srun --nodes="${#on[@]}" --nodelist="$(commas "${on[@]}")" --ntasks="$((tasks * ${#on[@]}))" \
    --ntasks-per-node="$tasks" --distribution=block --exact --mem=0 --cpus-per-task="$((cores > 0 ? cores : 1))" \
    --cpu-bind=none --kill-on-bad-exit=0 --wait="${WAIT_SECONDS:-30}" --label --output="$logs/${name}_node%n.log" "$@"
}

# srun's names for a task's place, under those of torchrun. A rank whose slurmstepd is gone ends by itself.
# shellcheck disable=SC2016
as_rank='export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID GROUP_RANK=$SLURM_NODEID
export MEGATRON_RL_PARENT=$PPID; exec "$@"'

# run COMMAND SERVING_NODES: the whole job. COMMAND is megatron-rl's: train or sft.
run() {
  local code=0 seen servers_step='' with_servers=() per_node=1 binding=()
  trap pass_on USR1
  prepare "$@"
  if [ "$2" -gt 0 ]; then
    if [ "$gpus" -gt 0 ]; then # each server sees its own GPUs only
      each=$(sed -n 's/^ *"gpus_each": \([1-9][0-9]*\),*$/\1/p' "$logs/plan.json") # --tp-size
      per_node=${SERVERS_PER_NODE:-$((gpus / ${each:-1}))}
      if [ "$per_node" = 0 ]; then
        say "a server takes ${each:-1} GPUs (--tp-size in rollout.sglang_arguments), and a node has $gpus; lower it"
        exit 2
      fi
      binding=(--gpus-per-task="$((gpus / per_node))")
    fi
    step serve "$per_node" "${serving_nodes[@]}" -- "${binding[@]}" megatron-rl serve "$config" "${@:3}" \
      ${binding:+--set rollout.servers=1} --register "$logs/servers" --of "$((per_node * $2))" &
    servers_step=$!
    with_servers=(--servers "$logs/servers")
  fi
  LOCAL_WORLD_SIZE=$ranks step "$1" "$ranks" "${training_nodes[@]}" -- bash -c "$as_rank" rank \
    megatron-rl "$1" "$config" "${@:3}" --resume "${with_servers[@]}" &
  training_step=$!
  if [ "$signalled" != 0 ]; then kill -USR1 "$training_step" 2>/dev/null || true; fi
  while :; do # a trap interrupts `wait`
    seen=$signalled
    code=0
    wait "$training_step" || code=$?
    if [ "$seen" = "$signalled" ]; then break; fi
  done
  if [ -n "$servers_step" ]; then
    kill -TERM "$servers_step" 2>/dev/null || true
    wait "$servers_step" || say "the serving step ended with $?; see $logs/serve_node*.log"
  fi
  finish "$code"
}

# finish CODE: of the training step. Nothing is put back into the queue that somebody has cancelled.
finish() {
  # 130, or 138 by SIGUSR1 itself before anything handled it: there was nothing to save yet.
  if [ "$1" = 75 ] || { [ "$signalled" != 0 ] && { [ "$1" = 130 ] || [ "$1" = 138 ]; }; }; then
    if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
      say "stopped with $1; back into the queue"
      scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$1"
  fi
  if [ "$1" != 0 ]; then
    say "failed with $1; the last lines of node 0:"
    tail --lines=20 "$logs"/*_node0.log
  fi
  exit "$1"
}
