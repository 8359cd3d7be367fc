#!/usr/bin/env bash
# All that a machine with a GPU can say, without network. Each plan keeps to its time, and every number is in
# OUTDIR/result.jsonl the moment it is measured.
#
#   bash benchmarks/gpu.sh first OUTDIR        correctness, then the kernels against their peers: at most 290 s
#   bash benchmarks/gpu.sh steps OUTDIR        what the focus costs in steps of full-size models: at most 240 s
#   bash benchmarks/gpu.sh training OUTDIR     whole runs, killed and resumed, and pairs a second: at most 420 s
#   bash benchmarks/gpu.sh deep OUTDIR         sweeps, variants, counters: at most 540 s
#   bash benchmarks/gpu.sh rehearsal OUTDIR    the same machinery on a CPU, at the smallest sizes
#   bash benchmarks/gpu.sh --dry-run           everything but the device: imports, shapes, launches, plans
#
# PYTHON chooses the interpreter (python3), BENCH_COMMIT names the commit where there is no repository. docs/performance.md says
# what to carry to a machine without network.
set -uo pipefail
python=${PYTHON:-python3}
case $python in */*) python=$(realpath -s "$python") ;; esac # a relative one is seen from here; a venv's link stays a link
usage() { grep '^#  ' "$0" | cut -c3- >&2; exit 2; }
[ $# -ge 1 ] || usage
if [ "$1" = --dry-run ]; then
  cd "$(dirname "$0")/.." && exec "$python" -m benchmarks.dry_run
fi
[ $# -eq 2 ] || usage
out=$(realpath -m -- "$2") && [ -n "$2" ] || usage
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
[ "$1" = rehearsal ] || unset TRITON_INTERPRET
exec "$python" -m benchmarks.gpu "$1" "$out"
