#!/bin/sh
# Answers an instance: run_instance.sh v1 CATEGORY ONNX VNNLIB RESULTS_FILE TIMEOUT
# FLOWVERIFY names another program than the one of install_tool.sh.
set -eu
[ $# -eq 6 ] || { echo "run_instance.sh: $# arguments, expected v1 CATEGORY ONNX VNNLIB RESULTS_FILE TIMEOUT" >&2; exit 2; }
installed=$(dirname "$0")/../.venv/bin/flowverify
[ -x "$installed" ] || installed=flowverify
exec ${FLOWVERIFY:-"$installed"} vnncomp "$@"
