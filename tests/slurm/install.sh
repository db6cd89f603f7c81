#!/usr/bin/env bash
# Installs Debian's packages for the Slurm tests. Does nothing if they are installed or cannot be installed: the tests
# then skip and name what is missing.
set -euo pipefail

for program in munged slurmctld slurmd sbatch ip nsenter unshare shellcheck; do
    command -v "$program" >/dev/null || missing=$program
done
if [[ -z ${missing:-} ]]; then
    exit 0
elif [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "the Slurm tests will skip: $missing is not installed, and only root on Debian can install it here"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
{ apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge iproute2 util-linux shellcheck; } >/dev/null ||
    echo "the Slurm tests will skip: apt-get could not install the packages"
