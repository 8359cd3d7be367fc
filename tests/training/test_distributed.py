"""Two processes: however the model is wrapped or split, training does what one process does with the same global batch.

The runs are started by `accelerate launch` from the files in configs/, on CPUs over gloo.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from focusdpo.data import LongestSide, PairDataset, SizeBatches, load_pairs
from focusdpo.data.images import read_image
from focusdpo.foundation.journals import read_metrics
from focusdpo.models import Flux1, TokenLayout
from focusdpo.models.lora_reading import LORA_FILE
from focusdpo.models.sizes import META, Architecture
from focusdpo.models.tiny_flux import VAE, build_flux, transformer_config
from focusdpo.training.config import OptimConfig, SamplesConfig
from focusdpo.training.memory import estimate, launched
from focusdpo.training.sharding import check_launch, split_like, whole
from focusdpo.training.trainer import Trainer
from tests import PATIENCE, ROOT
from tests.runs import rows_of, tiny_config

LAUNCH_FILES = {"ddp": "ddp", "unsynced": "ddp", "fsdp": "fsdp2", "zero2": "zero2", "zero3": "zero3"}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def config(tiny_flux, tiny_pairs, tmp_path_factory):
    settings = {
        "model.gradient_checkpointing": True,
        "data.validation": str(tiny_pairs),
        "data.batch_size": 2,
        # Where a gradient is as small as Adam's usual eps its last bits decide the step.
        "optim.eps": 1e-6,
        "optim.ema_decay": 0.9,
        "samples.every": 3,
        "samples.count": 3,
        "samples.steps": 1,
        "checkpoint_every": 2,
    }
    return tiny_config(tiny_flux, tiny_pairs, tmp_path_factory.mktemp("distributed"), settings)


def launch(config, world, *options, script="distributed_worker.py"):
    """Runs a worker in two processes and gives their standard error; options are accelerate's."""
    file = Path(config.output_dir).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    settings = ROOT / "configs" / f"accelerate-8x80gb-{LAUNCH_FILES[world]}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings)]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", *options]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"WORLD": world, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    worker = [str(Path(__file__).with_name(script)), "--config", str(file)]
    process = subprocess.Popen(
        [*command, *worker], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the workers too
        raise
    assert process.returncode == 0, errors[-5000:]
    return errors


def left(config):
    """Metrics without the clock's, and what each process left."""
    return rows_of(config), [torch.load(file) for file in sorted(Path(config.output_dir).glob("rank*.pt"))]


@pytest.fixture(scope="module")
def single(config):
    """One process that accumulates two batches a step: the same pairs, times and noise."""
    one = dataclasses.replace(config, gradient_accumulation=2)
    file = Path(one.output_dir).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dataclasses.asdict(one)))
    worker = Path(__file__).with_name("distributed_worker.py")
    command = [sys.executable, str(worker), "--config", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    rows, (process,) = left(one)
    assert len(process["gradients"]) == 3 and all(g.any() for g in process["gradients"][1])
    return rows, process, one.output_dir


def assert_equal_training(config, single, *, exact=False):
    """Losses, gradients of every step, and the adapter, of both processes."""
    expected_rows, expected, _ = single
    rows, processes = left(config)
    assert len(rows) == len(expected_rows) == 3 and len(processes) == 2
    tolerance = 0.0 if exact else 2e-5  # sums over processes are rounded in another order, and three steps carry that on
    for row, other in zip(rows, expected_rows, strict=True):
        assert row["pairs"] == other["pairs"]
        for name in ("loss", "margin", "gradient_norm", "error/policy_win", "focus/coverage"):
            assert row[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance)
    for process in processes:
        last = len(process["gradients"])  # after a resume those of the last steps
        for gradients, others in zip(process["gradients"], expected["gradients"][3 - last :], strict=True):
            for a, b in zip(gradients, others, strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
        for name, value in expected["adapter"].items():
            torch.testing.assert_close(process["adapter"][name], value, rtol=0, atol=tolerance)
    files = [Path(folder) / "validation.jsonl" for folder in (config.output_dir, single[2])]
    held_out, others = ({row["step"]: row["loss"] for row in read_metrics(file)} for file in files)
    assert [held_out[step] for step in others] == pytest.approx(list(others.values()), rel=1e-4)
    pages = [sorted(Path(folder, "samples", "step-000003").glob("*.png")) for folder in (config.output_dir, single[2])]
    assert [page.name for page in pages[0]] == [page.name for page in pages[1]] and len(pages[0]) == 9
    for page, other in zip(*pages, strict=True):
        if page.name.endswith("_sample.png"):
            difference = np.asarray(read_image(page)).astype(int) - np.asarray(read_image(other))
            assert abs(difference).max() <= 1, "the same noise, whichever process samples the pair"
    return processes


def test_ddp_trains_as_one_process(config, single):
    config = dataclasses.replace(config, output_dir=config.output_dir + "-ddp")
    config.data = dataclasses.replace(config.data, cache=config.output_dir + "-cache")
    output = launch(config, "ddp")
    processes = assert_equal_training(config, single, exact=True)
    assert all(len(process["gradients"]) == 3 for process in processes)
    encodings = len(list(Path(config.data.cache).rglob("*.safetensors")))
    assert f"{-(-encodings // 2)}/{-(-encodings // 2)} " in output, "each process encodes half"
    sizes = PairDataset(load_pairs(config.data.train), resolution=96, reference_rule=LongestSide(48))
    expected = [len(batch) for batch in SizeBatches(sizes, 2, shuffle=True, seed=0).epoch(0)[:2]]
    assert left(config)[0][0]["pairs"] == sum(expected), "metrics are over the pairs of both"


HYBRID = [
    *("--config_file", str(ROOT / "configs" / "accelerate-4nodes-fsdp2.yaml"), "--num_processes", "4"),
    *("--num_machines", "1", "--main_process_ip", "127.0.0.1"),
    *("--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "2"),
]


@pytest.mark.parametrize(("world", "count", "options"), [("ddp", 3, ["--num_processes", "3"]), ("fsdp", 4, HYBRID)])
def test_more_than_two_processes_train_as_one(config, tmp_path, world, count, options):
    """To rounding: sums of three take another order. The four are two machines' with two parts of the model each."""
    data = dataclasses.replace(config.data, validation=None)
    config = dataclasses.replace(config, data=data, samples=SamplesConfig(), max_steps=1)
    one = dataclasses.replace(config, output_dir=str(tmp_path / "one"), gradient_accumulation=count)
    Trainer(one).train()
    config = dataclasses.replace(config, output_dir=str(tmp_path / "several"))
    launch(config, world, *options)
    (row,), processes = left(config)
    ((expected,), _) = left(one)
    for name in ("pairs", "loss", "margin", "gradient_norm", "error/policy_win", "focus/coverage"):
        assert row[name] == pytest.approx(expected[name], rel=2e-5, abs=2e-5)
    assert len(processes) == count and {tuple(p["split"]) for p in processes} == {
        ("Tensor",) if world == "ddp" else ("DTensor",)
    }
    for process in processes[1:]:
        assert all(torch.equal(value, processes[0]["adapter"][name]) for name, value in process["adapter"].items())
    loras = [load_file(Path(run.output_dir) / "lora" / LORA_FILE) for run in (config, one)]
    for name, value in loras[0].items():
        torch.testing.assert_close(value, loras[1][name], rtol=0, atol=2e-5)


def test_gradients_that_are_not_averaged_are_noticed(config, single):
    """What the test above would say of a loop that calls the unwrapped model, as DPO loops have done in silence."""
    config = dataclasses.replace(config, output_dir=config.output_dir + "-unsynced")
    launch(config, "unsynced")
    with pytest.raises(AssertionError):
        assert_equal_training(config, single)
    first, second = (process["adapter"] for process in left(config)[1])
    assert any(not torch.equal(value, second[name]) for name, value in first.items())


def test_fsdp2_trains_as_one_process_and_resumes(config, single):
    """Stopped after two steps and resumed; the checkpoint holds whole tensors, and none of the base."""
    config = dataclasses.replace(config, output_dir=config.output_dir + "-fsdp", max_steps=2)
    launch(config, "fsdp")
    checkpoint = Path(config.output_dir) / "checkpoints" / "step-000002"
    launch(dataclasses.replace(config, max_steps=3, resume="latest"), "fsdp")
    processes = assert_equal_training(config, single)
    assert [process["split"] for process in processes] == [["DTensor"]] * 2, "every parameter is split"
    assert len(processes[0]["gradients"]) == 1, "of the step after the resume"
    averages = [load_file(Path(folder) / "lora_ema" / LORA_FILE) for folder in (config.output_dir, single[2])]
    for name, value in averages[0].items():
        torch.testing.assert_close(value, averages[1][name], rtol=0, atol=2e-5)

    state = torch.load(checkpoint / "state.pt", weights_only=True)
    shapes = {tuple(value.shape) for value in processes[0]["adapter"].values()}
    assert {tuple(moments["exp_avg"].shape) for moments in state["optimizer"]["state"].values()} == shapes
    base = sum(file.stat().st_size for file in Path(config.model.path, "transformer").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) < base / 4


def test_fsdp2_reads_the_model_in_one_process(config, tmp_path, monkeypatch):
    """The other never holds more than its half, has the same weights, and text encoders that are whole."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back at once, as a layer on its way does
    sizes = {**transformer_config((2, 2)), "num_attention_heads": 64}
    pipeline = build_flux(0, sizes, VAE)
    pipeline.save_pretrained(tmp_path / "model")
    size = sum(p.nbytes for p in pipeline.transformer.parameters())
    assert size > 300e6
    model = dataclasses.replace(config.model, path=str(tmp_path / "model"))
    config = dataclasses.replace(config, model=model, output_dir=str(tmp_path / "run"))
    # What a launch file may say, and transformers would leave text encoders without weights for.
    launch(config, "fsdp", "--fsdp_cpu_ram_efficient_loading", "true", script="loading_worker.py")
    first, second = (torch.load(tmp_path / "run" / f"rank{number}.pt") for number in range(2))
    assert second["taken"] < 0.65 * size, "half of the weights, and a layer on its way"
    # Here the parts stay in host memory too, which a GPU would have.
    backbone = Flux1.from_pretrained(config.model.path, dtype=torch.float32, parts="transformer", transformer_device=META)
    architecture = Architecture.of(backbone)
    part = estimate(architecture, config.model, config.lora, "no", TokenLayout((6, 6), ((3, 3),)), 1)
    need = launched(architecture, config.model, config.lora, part, "adamw", 2)
    assert first["taken"] + second["taken"] == pytest.approx(need.host_fsdp2 + size, rel=0.15)
    for process in (first, second):
        assert process["held"] == pytest.approx((size + part.adapter_weights) / 2, rel=1e-3)
    for process in (first, second):
        assert process["left_out"] == [False] and process["encoders"] == first["encoders"]
        assert process["persistent"]
        assert process["buffers"]["kept"].tolist() == [1.0] * 3
        assert process["buffers"]["derived"].tolist() == [[3, 3]] * 2
        assert process["sums"] == first["sums"]
    for name, value in pipeline.transformer.named_parameters():
        layer, kind = name.rsplit(".", 1)
        adapted = f"{layer}.base_layer.{kind}"
        assert first["sums"][adapted if adapted in first["sums"] else name] == value.double().sum()


@needs_deepspeed
@pytest.mark.parametrize("world", ["zero2", "zero3"])
def test_deepspeed_trains_as_one_process(config, single, world):
    config = dataclasses.replace(config, output_dir=f"{config.output_dir}-{world}", cpu=False)
    config.optim = dataclasses.replace(config.optim, ema_decay=0.0)
    if world == "zero3":
        launch(dataclasses.replace(config, max_steps=2), world)
        config.resume = "latest"
    launch(config, world)
    assert_equal_training(config, single)
    checkpoint = Path(config.output_dir) / "checkpoints" / "step-000003"
    parts = len(list((checkpoint / "deepspeed").glob("*optim_states.pt")))
    assert parts == 2, "each process has its part of the optimiser"


class Launched:
    """What `check_launch` asks an accelerator for."""

    class Plugin:
        fsdp_version = 2
        activation_checkpointing = False

    def __init__(self, kind, **plugin):
        self.distributed_type = kind
        self.state = self
        self.fsdp_plugin = type("Plugin", (self.Plugin,), plugin)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("FSDP", {"optim": {"optimizer": "adamw8bit"}}, "optim.optimizer: got 'adamw8bit', which does not work under FSDP"),
        ("DEEPSPEED", {"optim": {"optimizer": "prodigy", "lr": 1.0}}, "optim.optimizer: got 'prodigy'"),
        ("FSDP", {"model": {"quantization": "nf4"}}, "model.quantization: got 'nf4'"),
        ("DEEPSPEED", {"optim": {"ema_decay": 0.9}}, "optim.ema_decay: got 0.9"),
        ("DEEPSPEED", {"model": {"compile": True}}, "model.compile: got True"),
    ],
)
def test_what_cannot_be_split_is_refused(config, kind, changes, message):
    plain = dataclasses.replace(config, optim=OptimConfig())
    changed = {name: dataclasses.replace(getattr(plain, name), **values) for name, values in changes.items()}
    with pytest.raises(ValueError, match=message):
        check_launch(Launched(kind), dataclasses.replace(plain, **changed))
    check_launch(Launched(kind), plain)
    check_launch(Launched("MULTI_GPU"), dataclasses.replace(plain, **changed))


def test_launch_settings_that_are_refused(config):
    with pytest.raises(ValueError, match="fsdp_version: got 1; expected 2"):
        check_launch(Launched("FSDP", fsdp_version=1), config)
    with pytest.raises(ValueError, match="fsdp_activation_checkpointing: got true; expected false, model.gradient_checkp"):
        check_launch(Launched("FSDP", activation_checkpointing=True), config)


def test_whole_tensors_stay_as_they_are():
    state = {"a": [torch.ones(2), 3], "b": {"c": "text", "d": torch.arange(3)}}
    gathered = whole(state)
    assert gathered["a"][1] == 3 and gathered["b"]["c"] == "text" and torch.equal(gathered["b"]["d"], torch.arange(3))
    assert torch.equal(split_like(torch.ones(2), torch.zeros(2)), torch.ones(2))
