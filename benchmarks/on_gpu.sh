#!/usr/bin/env bash
# All that needs a GPU, in one command of less than ten minutes: benchmarks/on_gpu.sh all DIR. Its words are in on_gpu.py.
exec "${PYTHON:-python3}" -I "$(dirname "$0")/on_gpu.py" "$@" # -I: this folder holds a profile.py
