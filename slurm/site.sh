# shellcheck shell=bash disable=SC2034
# Facts of your cluster. Every script here reads this file, or the one that RLAD_SITE names.

# What sbatch and srun use by themselves (`man sbatch`, "INPUT ENVIRONMENT VARIABLES"). They act when you submit by
# running a script (slurm/NAME.sh); for a plain `sbatch slurm/NAME.sh` source this file in your shell first.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my_account

# Python that has this package's dependencies, on all nodes: in the container if there is one (/opt/rlad/bin/python in
# the Dockerfile's), else on the shared file system. Tasks start in the folder you submit from, so its code is what runs.
RLAD_PYTHON=.venv/bin/python

# Container, for clusters with pyxis and enroot: a squashfs file on the shared file system, or an image of a registry.
# Empty: the tasks run on the nodes as they are.
RLAD_CONTAINER_IMAGE=
# HOST:CONTAINER[:FLAGS],... The folder you submit from is always mounted under its own name; models, prompts and runs
# that lie elsewhere belong here. /dev/shm is there because servers on the trainer's nodes get their weights through it.
RLAD_CONTAINER_MOUNTS=/dev/shm:/dev/shm
# Python on the login node, to check a run before it is submitted; it needs pydantic and PyYAML only. Empty: the run is
# checked as the first thing in the job.
RLAD_LOGIN_PYTHON=.venv/bin/python

# Flags for every srun. Ranks and servers bind their own threads; Slurm must not pin each to one core.
RLAD_SRUN_FLAGS="--cpu-bind=none"

# Network: the interfaces over which the nodes reach one another, as `ip link` names them.
# export GLOO_SOCKET_IFNAME=eth0
# export NCCL_SOCKET_IFNAME=eth0
# export NCCL_IB_HCA=mlx5
