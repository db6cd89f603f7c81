#!/usr/bin/env bash
# The demo on a cluster, without a GPU: two trainer ranks on one node, a vLLM server on another.
# Run it first on a new cluster: it shows that the nodes reach each other and share a file system.
#
#   slurm/kk_tiny_cpu.sh [--sbatch-option ...] [key=value ...]      checks and freezes the configuration, then submits
#   sbatch slurm/kk_tiny_cpu.sh [key=value ...]                     the job does both when it starts
#
#SBATCH --job-name=kk_tiny_cpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --time=00:30:00
#SBATCH --output=%x_%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail
[[ -f slurm/job.sh ]] || { echo "rlad: $PWD has no slurm/job.sh; submit from the folder of the repository" >&2; exit 2; }
source slurm/job.sh
# No server for the teacher: rlad evaluate measures it.
rlad_job kk_tiny_cpu rollout.nodes=1 eval.teacher=false -- "$@"
