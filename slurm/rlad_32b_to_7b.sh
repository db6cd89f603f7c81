#!/usr/bin/env bash
# DeepSeek-R1-Distill-Qwen-32B teaches its 7B on math, responses of 30K tokens: recipe math_r1_distill_7b_from_32b.
# Eight nodes of eight GPUs: student and teacher on four, 32 rollout servers on the other four.
#
#   slurm/rlad_32b_to_7b.sh [--sbatch-option ...] [key=value ...]      checks and freezes the configuration, then submits
#   sbatch slurm/rlad_32b_to_7b.sh [key=value ...]                     the job does both when it starts
#
#SBATCH --job-name=rlad_32b_to_7b
#SBATCH --nodes=8
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
rlad_job math_r1_distill_7b_from_32b -- "$@"
