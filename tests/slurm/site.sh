# shellcheck shell=bash disable=SC2034
# Site file of the test cluster (cluster.sh): no container.
RLAD_PYTHON=${RLAD_TEST_PYTHON:-.venv/bin/python}
RLAD_LOGIN_PYTHON=$RLAD_PYTHON
export OMP_NUM_THREADS=1
