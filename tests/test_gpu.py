"""What only a GPU can show. Skipped, and saying so, where there is none."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from benchmarks import timing
from focusdpo import focus_dpo_loss, focus_mask
from focusdpo_kernels import SimilarityAccumulator, cross_layer_similarity, estimate_alignment, preference_residual, topk_mask
from tests import ROOT

DEVICE = "cuda"  # the dry run takes another
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


def inputs(batch=2, patches=64, tokens=40, width=64, subjects=2):
    def tensor(*shape):
        return torch.randn(shape, device=DEVICE).bfloat16()

    mask = torch.rand(batch, subjects, tokens, device=DEVICE) > 0.5
    side = 16 * round(patches**0.5)
    return {
        "target": [tensor(batch, patches, width) for _ in range(3)],
        "reference": [tensor(batch, tokens, width) for _ in range(3)],
        "mask": mask,
        "prior": torch.rand(batch, patches, device=DEVICE) > 0.5,
        "priors": torch.rand(batch, subjects, patches, device=DEVICE) > 0.5,
        "t": torch.rand(batch, device=DEVICE),
        "images": torch.rand(batch, 3, side, side, device=DEVICE),
        "predictions": [tensor(batch, patches, 16) for _ in range(6)],
    }


def step(x, pooling="reference", backend=None):
    scores = cross_layer_similarity(x["target"], x["reference"], x["mask"], pooling=pooling, backend=backend)
    similarity = SimilarityAccumulator(x["mask"], pooling=pooling, backend=backend)
    for target, reference in zip(x["target"], x["reference"], strict=True):
        similarity.update(target, reference)
    focus = focus_mask(scores, x["prior"], x["images"], reference_mask=x["mask"], backend=backend)
    policy = [p.detach().requires_grad_() for p in x["predictions"][:2]]
    out = focus_dpo_loss(*policy, *x["predictions"][2:], focus=focus, backend=backend)
    s = estimate_alignment(*x["predictions"][:4], -x["t"], backend=backend)
    estimate = focus_mask(s, x["priors"], x["images"], source="estimate", backend=backend)
    apart = focus_dpo_loss(*policy, *x["predictions"][2:], focus=estimate, subjects=x["priors"], backend=backend)
    gradients = [*torch.autograd.grad(out.loss, policy), *torch.autograd.grad(apart.loss, policy)]
    return [scores, similarity.result(), focus.mask, out.loss, s, estimate.mask, apart.loss, *gradients]


@pytest.mark.parametrize("pooling", ["reference", "max"])
def test_never_waits_for_the_device(pooling):
    x = inputs()
    step(x, pooling)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, pooling)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pooling", ["reference", "max"])
def test_cuda_graph(pooling):
    x = inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(x, pooling)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, pooling)
    for _ in range(20):
        fresh = inputs()
        # Calls in between: the captured call's host memory must not be reused by them.
        expected = step(fresh, pooling)
        for name in ("target", "reference", "predictions"):
            for old, new in zip(x[name], fresh[name], strict=True):
                old.copy_(new)
        for name in ("mask", "prior", "priors", "t", "images"):
            x[name].copy_(fresh[name])
        graph.replay()
        for actual, wanted in zip(captured, expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("pooling", ["reference", "max"])
def test_two_runs_give_the_same_bits(pooling):
    x = inputs(batch=3, patches=256, tokens=190, width=1024, subjects=3)
    first = step(x, pooling)
    for _ in range(5):
        for one, other in zip(first, step(x, pooling), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum", "masked_mean"])
def test_exchanging_winner_and_loser_negates_the_logit_to_the_bit(dtype, reduction):
    predictions = [torch.randn(5, 1000, 64, device="cuda").to(dtype) for _ in range(6)]
    mask = torch.rand(5, 1000, device="cuda")
    exchanged = [predictions[i] for i in (1, 0, 3, 2, 5, 4)]
    one = focus_dpo_loss(*predictions, focus=mask, reduction=reduction)
    other = focus_dpo_loss(*exchanged, focus=mask, reduction=reduction)
    assert torch.equal(one.logits, -other.logits) and one.logits.abs().min() > 0


def test_two_streams():
    """Two steps at the same time, each on a stream of its own, give what they give one after the other."""
    x, y = inputs(patches=256, width=512), inputs(patches=256, width=512)
    expected = [step(x), step(y)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for stream, one in zip(streams, (x, y), strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)
                results.append(step(one))
        torch.cuda.synchronize()
        for actual, wanted in zip(results, expected, strict=True):
            assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))


@pytest.mark.parametrize("pooling", ["reference", "max"])
def test_memory_that_is_given_out_again(pooling):
    """The device is far behind the host, and what calls leave behind (tables, sums) is given to the next at once."""
    several = [inputs(patches=256, width=256) for _ in range(8)]
    expected = [cross_layer_similarity(x["target"], x["reference"], x["mask"], pooling=pooling) for x in several]
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda._sleep(200_000_000)  # about 0.1 s
    actual = []
    for x in several * 4:
        out = cross_layer_similarity(x["target"], x["reference"], x["mask"], pooling=pooling)
        actual.append(out.clone())
        del out
        # What the host writes next into memory that a copy may still be waiting for, pinned and on the device.
        torch.full((4096,), -1, dtype=torch.int64).pin_memory()
        torch.full((64, 4096), float("nan"), device="cuda")
    for one, wanted in zip(actual, expected * 4, strict=True):
        assert torch.equal(one, wanted)


def test_timing(monkeypatch):
    """The instrument itself: graphs for short calls, launches and memory counted, plausible limits."""
    device = torch.device("cuda")
    x = torch.zeros(1000, device=device)
    how = timing.plan([lambda: x.add_(1)], device)
    assert how.method == "CUDA graph" and how.calls > 10
    before = float(x[0])
    how.round_()
    assert float(x[0]) == before + how.calls, "a round runs so many calls"
    assert timing.count_launches(lambda: x.mul_(2).add_(1), device) == 2
    assert timing.extra_memory(lambda: torch.empty(2**22, dtype=torch.uint8, device=device), device) == 2**22
    slow = torch.randn(8192, 8192, device=device)
    monkeypatch.setattr(timing, "GRAPH_BELOW", 1e-3)
    assert timing.plan([lambda: slow @ slow], device).method == "events"
    limits = timing.measure_limits(device)
    assert 1e11 < limits["read_bytes_per_second"] < 2e13 and len(limits["copies"]) == 4
    assert 1e11 < limits["copy_bytes_per_second"] < 2e13 and 1e-7 < limits["empty_launch_seconds"] < 1e-4


def test_beyond_two_to_the_31():
    """Offsets past 2^31 elements, in the batch and along the tokens."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB of GPU memory")
    big = torch.empty(2**31 + 2**24, dtype=torch.bfloat16, device="cuda")
    big[: 2**22].normal_()
    tail = big[-(2**23) :].normal_()
    target = torch.as_strided(big, (2, 64, 128), (2**31 + 2**23, 128, 1))
    reference = torch.as_strided(big, (2, 16, 128), (2**31 + 2**23, 128, 1), storage_offset=2**20)
    mask = torch.ones(2, 1, 16, device="cuda")
    for pooling in ("reference", "max"):
        actual = cross_layer_similarity([target], [reference], mask, pooling=pooling)
        expected = cross_layer_similarity([target.double()], [reference.double()], mask, pooling=pooling)
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)  # sums on tensor cores
    along_tokens = [torch.as_strided(big, (1, 2, 128), (0, 2**31 + 2**23, 1), storage_offset=i * 2**14) for i in (0, 1)]
    actual = cross_layer_similarity(along_tokens[:1], along_tokens[1:], mask[:1, :, :2])
    expected = cross_layer_similarity([along_tokens[0].double()], [along_tokens[1].double()], mask[:1, :, :2])
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)
    predictions = [torch.as_strided(big, (2, 64, 128), (2**31 + 2**23, 128, 1), storage_offset=i * 2**14) for i in range(6)]
    out = preference_residual(*predictions)
    exact = preference_residual(*[p.double() for p in predictions])
    torch.testing.assert_close(out.margin.double(), exact.margin, rtol=1e-4, atol=1e-6)
    assert tail.isfinite().all()
    scores = torch.zeros(2**31 + 2**20, dtype=torch.float16, device="cuda").reshape(-1, 2**20)
    scores[-1, 7] = 1
    assert topk_mask(scores, 1)[-1].nonzero().tolist() == [[7]]


def test_compiled_with_inductor():
    x = inputs()
    policy = [p.clone().requires_grad_() for p in x["predictions"][:2]]

    def loss(win, lose):
        scores = cross_layer_similarity(x["target"], x["reference"], x["mask"])
        focus = focus_mask(scores, x["prior"], x["images"], reference_mask=x["mask"], check_range=False)
        return focus_dpo_loss(win, lose, *x["predictions"][2:], focus=focus).loss

    compiled = torch.compile(loss, fullgraph=True)(*policy)
    torch.testing.assert_close(compiled, loss(*policy), rtol=1e-6, atol=1e-7)
    gradients = [torch.autograd.grad(value, policy) for value in (compiled, loss(*policy))]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-9)  # bf16


INTERPRETED_STEP = """
import sys, torch
from tests.test_gpu import step
x = torch.load(sys.argv[1])
torch.save(step(x, backend="triton"), sys.argv[2])
"""


def test_the_interpreter_gives_the_same(tmp_path):
    """What CI runs without a GPU against what runs on one."""
    x = inputs()
    torch.save({name: [t.cpu() for t in v] if isinstance(v, list) else v.cpu() for name, v in x.items()}, tmp_path / "in.pt")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", INTERPRETED_STEP, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=35)
    assert done.returncode == 0, done.stderr[-3000:]
    scores, streamed, mask, loss, *gradients = torch.load(tmp_path / "out.pt")
    actual = step(x)
    torch.testing.assert_close(actual[0].cpu(), scores, rtol=0, atol=1e-5)  # sums on tensor cores
    torch.testing.assert_close(actual[1].cpu(), streamed, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual[2].cpu(), mask, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual[3].cpu(), loss, rtol=1e-5, atol=1e-6)
    for one, other in zip(actual[4:], gradients, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-2, atol=1e-9)  # bf16


def training(tmp_path, tiny_flux, tiny_pairs, checkpointing):
    from focusdpo.training.config import DataConfig, FocusConfig, LoraConfig, ModelConfig, OptimConfig, TrainConfig

    return TrainConfig(
        model=ModelConfig(path=str(tiny_flux), dtype="bf16", max_sequence_length=16, gradient_checkpointing=checkpointing),
        data=DataConfig(train=str(tiny_pairs), resolution=96, reference_resolution_multiple=48, num_workers=0, check="headers"),
        output_dir=str(tmp_path / "run"),
        lora=LoraConfig(rank=4, alpha=8, dropout=0.1),
        focus=FocusConfig(tau=0.6),
        optim=OptimConfig(lr=1e-3),
        max_steps=8,
        mixed_precision="bf16",
        checkpoint_every=2,
        trackers=[],
    )


TRAIN = """
import pickle, sys
from focusdpo.training.trainer import Trainer
Trainer(pickle.load(open(sys.argv[1], "rb"))).train()
"""


def rows_and_lora(folder):
    """Metrics without the clock's, and the adapter."""
    from tests.runs import lora_of, rows_of

    return rows_of(folder), lora_of(folder)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointing"])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, request, checkpointing):
    for package in ("diffusers", "accelerate", "peft", "transformers", "skimage"):
        pytest.importorskip(package)
    from accelerate.state import AcceleratorState

    from focusdpo.training.trainer import Trainer

    config = training(tmp_path, request.getfixturevalue("tiny_flux"), request.getfixturevalue("tiny_pairs"), checkpointing)
    killed = dataclasses.replace(config, output_dir=str(tmp_path / "killed"), resume="latest")
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(killed))
    metrics = tmp_path / "killed" / "metrics.jsonl"
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "config.pickle")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def kill_after_three_steps():
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)

    watcher = threading.Thread(target=kill_after_three_steps)
    watcher.start()
    Trainer(config).train()  # meanwhile, the same without a kill
    AcceleratorState._reset_state(reset_partial_state=True)
    rows, lora = rows_and_lora(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, config.max_steps + 1))
    assert all(math.isfinite(row["gradient_norm"]) and not row["skipped_in_a_row"] for row in rows), "every step was taken"
    assert all(row["margin"] for row in rows[1:]), "and the adapter moved"
    _, errors = process.communicate(timeout=35)
    watcher.join()
    assert process.returncode == -signal.SIGKILL, errors[-3000:]
    Trainer(killed).train()
    resumed, resumed_lora = rows_and_lora(tmp_path / "killed")
    for one, other in zip(resumed, rows, strict=True):
        assert {k: (v, other[k]) for k, v in one.items() if v != other[k]} == {}, f"step {one['step']}"
    assert all(torch.equal(value, lora[name]) for name, value in resumed_lora.items())


@pytest.mark.parametrize("tokens", [2336, 3584])
def test_gradients_of_attention_are_the_same_each_time(tokens):
    """As a killed run of full size needs it; PyTorch's default adds up the queries' gradient in any order."""
    pytest.importorskip("diffusers")
    from focusdpo.models.sizes import RELEASED
    from focusdpo.training.determinism import repeatable

    RELEASED["FLUX.1 dev"].build(torch.bfloat16, 512)  # a backbone chooses among PyTorch's kernels
    x = [torch.randn(2, 24, tokens, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    weight = torch.randn(2, 24, tokens, 128, device="cuda", dtype=torch.bfloat16)
    with repeatable():
        runs = [torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(*x), x, weight) for _ in range(6)]
    assert all(torch.equal(one, first) for run in runs[1:] for one, first in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(("tokens", "heads", "width"), [(70, 2, 16), (2336, 24, 128), (3584, 24, 128), (5408, 24, 128)])
def test_attention_of_a_backbone(tokens, heads, width, tmp_path):
    """Gradients at the lengths of the demo's model, FLUX.1 at 512 px, klein at 512 px and FLUX.1 at 1024 px."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from focusdpo.models.sizes import RELEASED

    RELEASED["FLUX.1 dev"].build(torch.bfloat16, 512)  # a backbone chooses among PyTorch's kernels
    shape = (2, tokens, heads, width)
    one = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3)]
    weight = torch.randn(2, heads, tokens, width, device="cuda")
    out = torch.nn.functional.scaled_dot_product_attention(*one)
    gradients = torch.autograd.grad((out.float() * weight).sum(), one)
    for i in range(2):  # a sample at a time: the scores take memory
        exact = [x[i : i + 1].detach().float().requires_grad_() for x in one]
        attention = torch.softmax(exact[0] @ exact[1].mT / width**0.5, -1) @ exact[2]
        wanted = torch.autograd.grad((attention * weight[i : i + 1]).sum(), exact)
        for actual, expected in zip(gradients, wanted, strict=True):
            error = (actual[i : i + 1].float() - expected).norm() / expected.norm()
            assert error < 1e-2, "bf16"
