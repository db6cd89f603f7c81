#!/usr/bin/env bash
# Qwen3-8B teaches Qwen3-0.6B knights and knaves: recipe kk_qwen3_0p6b_from_8b. One node of eight GPUs: student and
# teacher on four, a rollout server on each of the others. For another recipe of one node edit the last line.
#
#   slurm/rlad_8b_to_0p6b.sh [--sbatch-option ...] [key=value ...]      checks and freezes the configuration, then submits
#   sbatch slurm/rlad_8b_to_0p6b.sh [key=value ...]                     the job does both when it starts
#
#SBATCH --job-name=rlad_8b_to_0p6b
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --output=%x_%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# A step takes 567 s in the paper (table 4), more than the usual five minutes.
#SBATCH --signal=B:USR1@900
set -euo pipefail
[[ -f slurm/job.sh ]] || { echo "rlad: $PWD has no slurm/job.sh; submit from the folder of the repository" >&2; exit 2; }
source slurm/job.sh
rlad_job kk_qwen3_0p6b_from_8b -- "$@"
