#!/usr/bin/env bash
# Fill wheels/ with what tools/gpu_kit.sh needs on a machine without network: Linux x86-64, Python 3.12, torch, Triton.
#
#   tools/gpu_wheels.sh
set -euo pipefail
cd "$(dirname "$0")/.."

# pip takes only the tags it is told, not older ones.
platforms=(manylinux2014_x86_64 manylinux_2_17_x86_64 manylinux_2_24_x86_64 manylinux_2_27_x86_64 manylinux_2_28_x86_64)
rm -rf wheels
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version 3.12 \
    "${platforms[@]/#/--platform=}" --dest wheels --requirement requirements/gpu-kit.txt
echo "wheels/: $(find wheels -name '*.whl' | wc -l) wheels, $(du -sm wheels | cut -f1) MB"
