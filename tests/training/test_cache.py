"""The cache of latents and embeddings: the same bits as without it, filled once, whatever interrupts or changes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file, save_file

from focusdpo.data import load_pairs
from focusdpo.demo.scenes import write_dataset
from focusdpo.foundation.journals import read_metrics
from focusdpo.foundation.tensor_files import TensorFiles
from focusdpo.models import Backbone, Flux1, Flux2, QwenEditPlus
from focusdpo.training.trainer import Trainer
from tests.runs import lora_of, rows_of
from tests.tiny_flux2 import write_tiny_flux2
from tests.tiny_qwen import write_tiny_qwen


@pytest.fixture(scope="module")
def tiny_pairs(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "pairs", 4, 64, seed=0)


# Batches of two pairs, masks from both images, held-out pairs.
SETTINGS = {
    "data.validation": "{pairs}", "data.resolution": 64, "data.reference_resolution_multiple": 32,
    "data.batch_size": 2, "data.cache": "{folder}/cache", "focus.mask_from": "each", "optim.lr": 2e-05,
}  # fmt: skip


@pytest.fixture
def encoded(monkeypatch):
    """The calls of VAE and text encoders, as a list of "image" and "prompt", and the parts of each loaded pipeline."""
    calls, loaded = [], []
    for model in (Flux1, Flux2, QwenEditPlus):
        for name, method in (("image", "encode_images"), ("prompt", "encode_prompts")):
            original = getattr(model, method)

            def count(self, *args, name=name, original=original):
                calls.append(name)
                return original(self, *args)

            monkeypatch.setattr(model, method, count)
    load = Backbone.from_pretrained.__func__

    def from_pretrained(cls, *args, **kwargs):
        backbone = load(cls, *args, **kwargs)
        loaded.append({name for name, part in backbone.pipeline.components.items() if isinstance(part, torch.nn.Module)})
        return backbone

    monkeypatch.setattr(Backbone, "from_pretrained", classmethod(from_pretrained))
    return calls, loaded


def trainer(config, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Trainer(dataclasses.replace(config, overwrite=True, **changes))


def train(config, **changes):
    """Numbers of a run, without its clock."""
    run = trainer(config, **changes)
    run.train()
    rows = rows_of(run.folder, "metrics", "validation")
    assert [row["step"] for row in rows] == [1, 2, 3, 0, 3]
    return rows, lora_of(run.folder)


def without_cache(config):
    return dataclasses.replace(config.data, cache=None)


def files(config):
    return {path: path.read_bytes() for path in Path(config.data.cache).rglob("*") if path.is_file()}


def items(config):
    """Distinct images at their sizes and distinct prompts of the dataset, counted apart from the code under test.

    Qwen's encoder reads the references in front of the prompt.
    """
    records = load_pairs(config.data.train)
    targets = {path.read_bytes() for r in records for path in (r.winner, r.loser)}
    references = {(len(r.references) > 1, ref.image.read_bytes()) for r in records for ref in r.references}
    seen = config.model.backbone == "qwen-edit-plus"
    prompts = {(r.prompt, *(ref.image.read_bytes() for ref in r.references if seen)) for r in records}
    return len(targets) + len(references), len(prompts)


@pytest.mark.parametrize(
    ("backbone", "precision", "size"),
    [("flux", "no", 32), ("flux", "bf16", 32), ("flux", "no", None), ("flux2", "no", 32), ("qwen-edit-plus", "no", 32)],
)
def test_the_same_bits_with_and_without(config, tmp_path, encoded, backbone, precision, size):
    calls, loaded = encoded
    config.data.reference_resolution_multiple = size  # None: the backbone's own
    config.mixed_precision = precision
    config.model.backbone = backbone
    if backbone != "flux":
        write = {"flux2": write_tiny_flux2, "qwen-edit-plus": write_tiny_qwen}[backbone]
        config.model.path = str(write(tmp_path / "model"))
        config.model.max_sequence_length = 64
    rows, lora = train(config, data=without_cache(config))
    assert len(calls) > sum(items(config)) and len(loaded) == 1
    calls.clear()
    cached_rows, cached_lora = train(config)
    images, prompts = items(config)
    assert (calls.count("image"), calls.count("prompt")) == (images, prompts), "each once"
    assert cached_rows == rows
    assert lora.keys() == cached_lora.keys() and all(torch.equal(value, cached_lora[name]) for name, value in lora.items())
    calls.clear(), loaded.clear()
    config.data.num_workers = 1 if backbone == "flux" else 0  # the loader's processes read the cache
    again, _ = train(config)
    assert again == rows and not calls
    assert loaded == [{"transformer"}], "neither VAE nor text encoders"


def test_encoders_never_stand_beside_the_transformer(config, encoded):
    run = trainer(config)
    _, loaded = encoded
    assert loaded == [{"vae", "text_encoder", "text_encoder_2"}, {"transformer"}]
    pipeline = run.backbone.pipeline
    assert pipeline.vae is pipeline.text_encoder is pipeline.text_encoder_2 is None
    with pytest.raises(RuntimeError, match="loaded without its VAE .*data.cache"):
        run.backbone.decode_images(torch.zeros(1, 4, 16), (2, 2))


def test_an_interrupted_filling_goes_on(config, encoded, monkeypatch):
    calls, _ = encoded
    encode = Flux1.encode_images

    def killed(self, images):
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Flux1, "encode_images", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer(config)
    before = files(config)
    assert len(before) == len(calls) == 5 and all(path.suffix == ".safetensors" for path in before)
    calls.clear()
    trainer(config)
    assert len(calls) == sum(items(config)) - 5
    assert before.items() <= files(config).items(), "what was there is left alone"


def test_a_kill_while_a_file_is_written_leaves_no_half_of_it(config, encoded, monkeypatch):
    write = Path.write_bytes

    def killed(path, content):
        is_kept = ".safetensors" in path.name  # the folder's own lists are none of the cache
        write(path, b"half" if is_kept else content)
        if is_kept:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # a kill leaves no time to clean up
        with pytest.raises(KeyboardInterrupt):
            trainer(config)
    assert [path.suffix for path in files(config)] == [".partial"]
    encoded[0].clear()
    trainer(config)
    assert len(encoded[0]) == sum(items(config))


def test_damaged_files_are_encoded_again(config, encoded, caplog):
    trainer(config)
    whole = files(config)
    cut, empty, shorter = [path for path in whole if "tokens" in load_file(path)][:3]
    cut.write_bytes(whole[cut][:-1])
    empty.write_bytes(b"")
    save_file({"tokens": load_file(shorter)["tokens"][1:].clone()}, shorter)
    encoded[0].clear()
    trainer(config)
    assert encoded[0] == ["image"] * 3 and files(config) == whole
    assert f"{cut} is damaged" in caplog.text and f"{empty} is damaged" in caplog.text
    # One byte in each, in the header and in the tensors.
    flipped = {path: bytearray(content) for path, content in whole.items()}
    for number, (path, content) in enumerate(flipped.items()):
        content[9 if number % 4 == 0 else -5] ^= 4
        path.write_bytes(content)
    encoded[0].clear()
    trainer(config)
    assert len(encoded[0]) == sum(items(config)) and files(config) == whole
    encoded[0].clear()
    trainer(config)
    assert not encoded[0]


def test_a_file_that_changes_and_keeps_its_time_is_found_when_it_is_read(config, encoded):
    run = trainer(config)
    for path, content in files(config).items():
        state = path.stat()
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 4]) + content[-4:])
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(ValueError, match=r"data.cache: .*safetensors was damaged .* and is deleted; the same command"):
        run.train_set[0]


def test_other_settings_reuse_only_what_stays_the_same(config, encoded):
    trainer(config)
    images, prompts = items(config)
    references = {ref.image.read_bytes() for r in load_pairs(config.data.train) for ref in r.references}
    for changes, expected in (
        ({"data": {"resolution": 80}}, (images - len(references), 0)),
        ({"data": {"reference_resolution_multiple": 48}}, (len(references), 0)),
        ({"data": {"reference_buckets": ["1:1"], "max_crop": 0.9}}, (len(references), 0)),
        ({"data": {"reference_resolution_multiple": None}}, (len(references), 0)),
        ({"model": {"max_sequence_length": 24}}, (0, prompts)),
        ({"model": {"dtype": "bf16"}}, (images, prompts)),
        ({"mixed_precision": "bf16"}, (images, prompts)),
        ({"data": {"batch_size": 1}, "model": {"guidance": 2.0}, "seed": 3}, (0, 0)),
    ):
        parts = {name: getattr(config, name) for name in changes}
        changed = {k: dataclasses.replace(parts[k], **v) if isinstance(v, dict) else v for k, v in changes.items()}
        encoded[0].clear()
        trainer(config, **changed)
        assert (encoded[0].count("image"), encoded[0].count("prompt")) == expected, changes


def test_what_qwens_prompts_see_does_not_depend_on_the_size_of_the_references(config, encoded, tmp_path):
    config.model = dataclasses.replace(config.model, path=str(write_tiny_qwen(tmp_path / "model")), backbone="qwen-edit-plus")
    trainer(config)
    prompts = items(config)[1]
    references = {ref.image.read_bytes() for r in load_pairs(config.data.train) for ref in r.references}
    for changes, expected in (
        ({"reference_resolution_multiple": 48}, (len(references), 0)),
        ({"reference_buckets": ["1:1"], "max_crop": 0.9}, (len(references), prompts)),  # a cut photo is another one
    ):
        encoded[0].clear()
        trainer(config, data=dataclasses.replace(config.data, **changes))
        assert (encoded[0].count("image"), encoded[0].count("prompt")) == expected, changes


def test_other_content_under_the_same_name_is_not_reused(config, encoded, tiny_pairs, tmp_path):
    copied = tmp_path / "pairs"
    shutil.copytree(tiny_pairs.parent, copied)
    config.data.train = config.data.validation = str(copied)
    trainer(config)
    encoded[0].clear()
    record = load_pairs(str(copied))[0]
    with Image.open(record.winner) as image:
        turned = image.rotate(180)
    turned.save(record.winner)
    lines = (copied / "pairs.jsonl").read_text().splitlines()
    (copied / "pairs.jsonl").write_text("\n".join([json.dumps(json.loads(lines[0]) | {"prompt": "a new prompt"}), *lines[1:]]))
    trainer(config)
    assert sorted(encoded[0]) == ["image", "prompt"]


def test_other_encoders_are_told_by_their_weights(config, encoded, tiny_flux, tmp_path):
    """Not by where they lie, nor by when they were copied there."""
    trainer(config)
    config.model.path = str(tmp_path / "model")
    shutil.copytree(tiny_flux, config.model.path, copy_function=shutil.copyfile)
    for part, expected in (("transformer", set()), ("vae", {"image"}), ("text_encoder_2", {"prompt"})):
        (file,) = (tmp_path / "model" / part).glob("*.safetensors")
        state = load_file(file)
        last = max(state)
        save_file(state | {last: state[last] + 0.01}, file, metadata={"format": "pt"})
        encoded[0].clear()
        trainer(config)
        assert set(encoded[0]) == expected


def test_the_cache_may_come_and_go_on_resume(config):
    rows, _ = train(config, max_steps=3)
    AcceleratorState._reset_state(reset_partial_state=True)
    first = dataclasses.replace(config, output_dir=config.output_dir + "2", max_steps=1, data=without_cache(config))
    Trainer(first).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    Trainer(dataclasses.replace(first, max_steps=3, resume="latest", data=config.data)).train()
    losses = [row["loss"] for row in read_metrics(Path(first.output_dir) / "metrics.jsonl")]
    assert losses == [row["loss"] for row in rows[:3]]


def test_what_cannot_be_is_refused_before_the_model(config, encoded):
    Path(config.data.cache).write_text("")
    with pytest.raises(NotADirectoryError, match="data.cache: .* is a file; name a folder"):
        trainer(config)
    config.data.cache += "s"
    config.model.path = "nobody/no-such-model"
    with pytest.raises(
        ValueError,
        match="model.path: nobody/no-such-model: no folder of that name is in /.*, and from the hub it cannot be loaded",
    ):
        trainer(config)
    assert encoded[1] == []


def test_a_folder_that_is_not_shared_is_named(config, monkeypatch):
    monkeypatch.setattr(TensorFiles, "write", lambda self, key, tensors: None)
    monkeypatch.setattr("focusdpo.foundation.files.COMES", 0.2)
    with pytest.raises(FileNotFoundError, match="data.cache: .* name a folder that all processes share"):
        trainer(config)
