"""CPU time of the host for a streamed layer and for the residual's two passes, without a GPU: launches go to a driver that does
nothing.

python -m benchmarks.host_time                       # of this checkout
python -m benchmarks.host_time --against CHECKOUT    # and of another one, in turn with it on the same machine

Triton's own launch path is in it; what a real driver, the device guard and the choice of a stream take is not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROUNDS = 5

WORK = {
    "streamed": "SimilarityAccumulator.update (P = 1024, Q = 800, D = 3072, R = 2), with its share of the result after 25",
    "residual": "preference_residual forward and backward (B = 1, P = 256, C = 64)",
}
# Of public names only, so that older checkouts run it as well.
WORKER = """
import json, time, torch
from focusdpo_kernels import SimilarityAccumulator, preference_residual
from focusdpo_kernels.tools import stub_driver

stub_driver.install()
layers = [torch.randn(1, 1824, 3072).bfloat16() for _ in range(4)]
mask = torch.rand(1, 2, 800) > 0.5
predictions = [torch.randn(1, 256, 64).bfloat16().requires_grad_(n < 2) for n in range(6)]
weight, ones = torch.rand(1, 256), torch.ones(1)

def streamed(count):
    similarity = SimilarityAccumulator(mask)
    for n in range(count):
        similarity.update(layers[n % 4][:, :1024], layers[n % 4][:, 1024:])
    return similarity.result()

def residual(count):
    for _ in range(count):
        torch.autograd.grad(preference_residual(*predictions, weight, backend="triton").margin, predictions[:2], ones)

found = {}
for work in (streamed, residual):
    work(25)
    with stub_driver.launches() as launches:
        work(25)
    times = []
    for _ in range(50):
        start = time.process_time()
        work(25)
        times.append((time.process_time() - start) / 25)
    found[work.__name__] = {"seconds": min(times), "launches": len(launches) / 25}
print(json.dumps(found))
"""


def measure(checkout: Path) -> dict[str, dict[str, float]]:
    """Seconds of CPU time and launches of each work, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(checkout)}
    run = subprocess.run([sys.executable, "-c", WORKER], cwd=checkout, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"host_time: {checkout} failed\n{run.stderr[-2000:]}")
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="folder of another version of this project")
    options = parser.parse_args()
    checkouts = {"this checkout": ROOT} | ({} if options.against is None else {str(options.against): options.against.resolve()})
    rounds = [{name: measure(path) for name, path in checkouts.items()} for _ in range(ROUNDS)]
    for work, title in WORK.items():
        print(title)
        for name in checkouts:
            times = [1e6 * one[name][work]["seconds"] for one in rounds]
            launches = rounds[0][name][work]["launches"]
            print(
                f"  {name}: {statistics.median(times):.1f} us of CPU time ({min(times):.1f} to {max(times):.1f} in {ROUNDS} "
                f"processes), {launches:.2f} launches, {statistics.median(times) / launches:.1f} us a launch"
            )


if __name__ == "__main__":
    main()
