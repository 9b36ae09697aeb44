#!/usr/bin/env bash
# What was never run on a GPU, in eleven minutes on one of them: benchmarks/gpu.sh [--tiny]
# --tiny tries the script itself on a CPU. Everything else is in gpu.py.
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" benchmarks/gpu.py "$@"
