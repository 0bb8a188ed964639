#!/bin/sh
# Looks an instance up: prepare_instance.sh v1 CATEGORY ONNX VNNLIB
# Exit code 1: it is no instance of an export. FLOWVERIFY names another program than the one of install_tool.sh.
set -eu
[ $# -eq 4 ] || { echo "prepare_instance.sh: $# arguments, expected v1 CATEGORY ONNX VNNLIB" >&2; exit 2; }
installed=$(dirname "$0")/../.venv/bin/flowverify
[ -x "$installed" ] || installed=flowverify
exec ${FLOWVERIFY:-"$installed"} vnncomp "$@"
