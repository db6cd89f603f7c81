#!/usr/bin/env bash
# Qwen3-235B-A22B teaches Qwen3-30B-A3B on math, responses of 30K tokens: recipe math_qwen3_30b_a3b_from_235b.
# Ten nodes of eight GPUs: the student on four, the teacher on two, 16 rollout servers on the other four.
#
#   slurm/rlad_235b_to_30b.sh [--sbatch-option ...] [key=value ...]      checks and freezes the configuration, then submits
#   sbatch slurm/rlad_235b_to_30b.sh [key=value ...]                     the job does both when it starts
#
#SBATCH --job-name=rlad_235b_to_30b
#SBATCH --nodes=10
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x_%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# More than a step of 30K tokens should take; see time/step in metrics.jsonl.
#SBATCH --signal=B:USR1@1800
set -euo pipefail
[[ -f slurm/job.sh ]] || { echo "rlad: $PWD has no slurm/job.sh; submit from the folder of the repository" >&2; exit 2; }
source slurm/job.sh
rlad_job math_qwen3_30b_a3b_from_235b -- "$@"
