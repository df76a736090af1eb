#!/usr/bin/env bash
# The paper profile on a Slurm cluster: sbatch examples/slurm.sh [options of focus reproduce]
# Submitted again, it goes on where it was. Every node needs this environment, and checkpoints and data in $HF_HOME.
#SBATCH --job-name=focus
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

RAY_AUTH_TOKEN=$(python3 -c 'import secrets; print(secrets.token_hex(32))') # without it, a node's port is everyone's
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

head=$(hostname)
address=$(hostname --ip-address | cut -d ' ' -f 1)
port=$((20000 + SLURM_JOB_ID % 10000))
gpus=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-8}))

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$address" --port="$port" --include-dashboard=false --block &
sleep "${HEAD_SECONDS:-30}"
if ((SLURM_NNODES > 1)); then
  srun --overlap --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --exclude="$head" \
    ray start --address="$address:$port" --block &
  sleep "${HEAD_SECONDS:-30}"
fi

focus plan --profile paper --address "$address:$port" # ends here, with a line each, if anything is missing on a node
focus reproduce --profile paper --engine ray --address "$address:$port" --workers "$gpus" "$@"
