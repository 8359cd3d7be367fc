#!/usr/bin/env bash
# All that a machine with a GPU can say, in under 9 minutes and without network: correctness first, then times, then the report.
#
#   bash benchmarks/gpu.sh OUTDIR
#
# PYTHON chooses the interpreter (python3), BENCH_COMMIT names the commit where there is no repository. A part that runs out of
# its time keeps what it has measured. Nothing is timed where the tests are red.
set -uo pipefail
out=$(realpath -m "${1:?usage: bash benchmarks/gpu.sh OUTDIR}")
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET

"$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "gpu.sh: PyTorch sees no GPU here")' || exit 1
"$python" -m focusdpo_kernels.env | tee "$out/env.txt"

echo "== correctness"
files=(tests/test_{gpu,similarity,matching,entropy,residual,loss,mask,accuracy,ops}.py)
timeout -s INT 150 "$python" -m pytest -q -n 8 --benchmark-disable -p no:cacheprovider "${files[@]}" 2>&1 |
  tee "$out/tests.txt" | tail -40
red=${PIPESTATUS[0]}
if [ "$red" -ne 0 ]; then
  echo "gpu.sh: the tests are red ($red): nothing is timed; see $out/tests.txt"
  exit "$red"
fi

echo "== kernels"
timeout -s INT 220 "$python" -m pytest -q benchmarks -p no:cacheprovider --benchmark-columns=median,iqr,rounds \
  --benchmark-json "$out/result.json" > "$out/kernels.txt" 2>&1
kernels=$?
grep -E "^FAILED|passed|failed|error" "$out/kernels.txt" | tail -20

if "$python" -c 'import diffusers, accelerate, peft' 2> /dev/null; then
  echo "== steps"
  step=("$python" -m benchmarks.step --device cuda --steps 5 --result "$out/result.json")
  timeout -s INT 75 "${step[@]}" --backbone flux1 2>&1 | tee "$out/steps.txt"
  timeout -s INT 60 "${step[@]}" --backbone flux1 --throughput --target 512 2>&1 | tee -a "$out/steps.txt"
  timeout -s INT 30 "${step[@]}" --backbone flux2-klein-4b --target 512 2>&1 | tee -a "$out/steps.txt"
else
  echo "== steps: left out, diffusers, accelerate or peft cannot be imported here"
fi

"$python" -m benchmarks.report "$out/result.json" --out "$out"
exit "$kernels"
