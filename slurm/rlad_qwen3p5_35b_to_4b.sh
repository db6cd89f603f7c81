#!/usr/bin/env bash
# Qwen3.5-35B-A3B teaches Qwen3.5-4B on math, responses of 30K tokens: recipe math_qwen3p5_4b_from_35b_a3b.
# Two nodes of eight GPUs: student and teacher on one, eight rollout servers on the other.
#
#   slurm/rlad_qwen3p5_35b_to_4b.sh [--sbatch-option ...] [key=value ...]   checks and freezes, then submits
#   sbatch slurm/rlad_qwen3p5_35b_to_4b.sh [key=value ...]             the job does both when it starts
#
#SBATCH --job-name=rlad_qwen3p5_35b_to_4b
#SBATCH --nodes=2
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
rlad_job math_qwen3p5_4b_from_35b_a3b -- "$@"
