# shellcheck shell=bash disable=SC2034
# Your cluster. Every script in this folder reads this file, or the one that RLAD_SITE names.

# Variables of sbatch and srun (`man sbatch`, "INPUT ENVIRONMENT VARIABLES"). They work when you submit by running a
# script (slurm/NAME.sh); for plain `sbatch slurm/NAME.sh` source this file in your shell first.
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my_account

# Python with this package's dependencies, on all nodes: in the container if there is one (/opt/rlad/bin/python in the
# Dockerfile's), otherwise on the shared file system. Tasks start in the folder you submit from and run its code.
RLAD_PYTHON=.venv/bin/python

# On nodes that have a cuDNN of their own, outside of a container: Transformer Engine would load it beside torch's. A run
# prints which it has loaded. Both variables are needed; the folder is in the environment of RLAD_PYTHON.
# export CUDNN_HOME=$PWD/.venv/lib/python3.12/site-packages/nvidia/cudnn
# export LD_LIBRARY_PATH=$CUDNN_HOME/lib:$LD_LIBRARY_PATH

# Container, for clusters with pyxis and enroot: a squashfs file on the shared file system, or a registry's image.
# Empty: no container.
RLAD_CONTAINER_IMAGE=
# HOST:CONTAINER[:FLAGS],... The folder you submit from is always mounted under the same path; add models, prompts and
# runs that are elsewhere. Servers on the trainer's nodes get their weights through /dev/shm.
RLAD_CONTAINER_MOUNTS=/dev/shm:/dev/shm
# Python on the login node, which checks a run and freezes its configuration before sbatch. It needs only pydantic and
# PyYAML. Empty: the job does both when it starts.
RLAD_LOGIN_PYTHON=.venv/bin/python

# Flags for every srun. Ranks and servers bind their own threads; Slurm must not pin them to one core.
RLAD_SRUN_FLAGS="--cpu-bind=none"

# Network: the interfaces between the nodes, as `ip link` names them.
# export GLOO_SOCKET_IFNAME=eth0
# export NCCL_SOCKET_IFNAME=eth0
# export NCCL_IB_HCA=mlx5
