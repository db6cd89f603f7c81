#!/usr/bin/env bash
# What only a GPU can prove, on a machine that has Python, torch and Triton, and no network.
#
#   tools/gpu_wheels.sh                  # first, on a machine with network: fills wheels/
#   tools/gpu_kit.sh --minutes 8         # on the GPU
#   tools/gpu_kit.sh --size tiny         # the same on a CPU
#
# The options are those of benchmarks/gpu_check.py. Installs new wheels into .gpu-kit/, and compiles nothing. PYTHON
# names the interpreter. A part that hangs or crashes ends its process; the others run in the next one.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
site=$PWD/.gpu-kit
shopt -s nullglob
wheels=(wheels/*.whl)
if [ ${#wheels[@]} = 0 ]; then
    echo "gpu_kit: wheels/ is empty; run tools/gpu_wheels.sh where there is network. Runs what this Python can run."
elif [ ! "$site/.complete" -nt wheels ]; then
    rm -rf "$site"
    if "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
        --root-user-action ignore --target "$site" "${wheels[@]}"; then
        touch "$site/.complete"
    else
        echo "gpu_kit: $("$python" --version) cannot install wheels/, made for Python 3.12 on Linux x86-64 by" \
            "tools/gpu_wheels.sh. Runs what this Python can run."
    fi
fi
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

while :; do
    "$python" benchmarks/gpu_check.py "$@" --spent "$SECONDS"
    code=$?
    # 128 and above: a signal ended it. Not that of Ctrl-C or of one who wants it to end.
    case $code in
    130 | 143) exit $code ;;
    esac
    [ $code -lt 128 ] && exit $code
done
