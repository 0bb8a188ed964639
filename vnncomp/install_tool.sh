#!/bin/sh
# Installs flowverify for VNN-COMP, with everything that it can use: install_tool.sh v1
# The environment is that of `make install`, of which the Makefile says what can be chosen (PYTHON, TORCH).
set -eu
[ "${1:-}" = v1 ] || { echo "install_tool.sh: version '${1:-}', expected v1" >&2; exit 2; }
make -C "$(dirname "$0")/.." install
