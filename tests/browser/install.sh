#!/usr/bin/env bash
# Installs Debian's Chromium for the browser tests. Does nothing if it is installed or cannot be installed: the tests
# then skip and say so.
set -euo pipefail

if command -v chromium >/dev/null; then
    exit 0
elif [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
    echo "the browser tests will skip: chromium is not installed, and only root on Debian can install it here"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
{ apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null ||
    echo "the browser tests will skip: apt-get could not install chromium"
