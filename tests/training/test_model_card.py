"""The model card of a finished run, and its upload to a hub that a local server plays."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shlex
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from PIL import Image

from focusdpo.commands.cli import main, parse_config
from focusdpo.demo.scenes import write_dataset
from focusdpo.foundation.journals import read_metrics
from focusdpo.models import BACKBONES
from focusdpo.models.qwen import ImageTextProcessor
from focusdpo.training import hub
from focusdpo.training.config import (
    HubConfig,
    ModelConfig,
    SamplesConfig,
)
from focusdpo.training.hub import UploadError, check_hub
from focusdpo.training.model_card import KOHYAS, MASK_MOVES, _use, write_model_card
from focusdpo.training.trainer import Trainer
from tests.runs import train
from tests.sampling.studies import BACKBONE, WRITE, load, write_random_lora


@pytest.fixture(scope="module")
def tiny_pairs(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "pairs", 4, 64, seed=0)


SETTINGS = {
    "data.validation": "{pairs}", "data.resolution": 64, "data.reference_resolution_multiple": 32,
    "data.batch_size": 2, "focus.mask": "prior", "optim.lr": 0.01, "samples.every": 1,
    "samples.count": 2, "samples.steps": 1, "max_steps": 1, "backend": "torch",
}  # fmt: skip


def test_card(config, tmp_path):
    trainer = train(config)
    lora = trainer.folder / "lora"
    card = ModelCard.load(lora / "README.md")
    assert card.data.library_name == "diffusers" and {"lora", "focusdpo", "flux"} <= set(card.data.tags)
    assert card.data.base_model is None, "a local folder is no model's name"
    assert str(tmp_path) not in card.content and str(Path(config.model.path).parent) not in card.content
    settings = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", card.text, re.DOTALL)]
    assert settings[0]["optim"] == {"lr": 0.01} and settings[0]["lora"] == {"rank": 4, "alpha": 8}
    assert "base_lora" not in settings[0]["model"] and settings[1]["model"]["base_lora"] is None
    assert settings[1].keys() == dataclasses.asdict(config).keys()
    rows = read_metrics(trainer.folder / "validation.jsonl")
    assert f"| implicit accuracy | {rows[0]['accuracy']:.4g} | {rows[1]['accuracy']:.4g} |" in card.text
    assert f"| margin | 0 | {rows[1]['margin']:.4g} |" in card.text
    records = trainer.train_set.records
    assert "- 4 pairs, by their number of references: 2 (4)" in card.text and "64x64 (4)" in card.text
    for name in {r.class_name for record in records for r in record.references}:
        count = sum(r.class_name == name for record in records for r in record.references)
        assert f"{name} ({count})" in card.text
    assert "torch 2." in card.text and "set_adapters" not in card.text
    assert "--to kohya" in card.text and "| sd-scripts |" in card.text and KOHYAS.keys() == BACKBONES.keys()
    sheets = [Image.open(trainer.folder / "samples" / "step-000001" / f"{i}.png") for i in range(2)]
    page = Image.open(lora / "samples.png")
    assert page.size == (sheets[0].width, sum(sheet.height for sheet in sheets))
    assert list(page.crop((0, 0, *sheets[0].size)).getdata()) == list(sheets[0].getdata())
    assert Image.open(lora / "curves.png").width > 1000
    assert all((lora / name).is_file() for name in re.findall(r"!\[.*?\]\((.*?)\)", card.text))


def test_the_cards_lines_load_the_lora(config, tiny_flux):
    """As they stand there, in diffusers and in PEFT: the trained updates, at full strength."""
    config.samples = SamplesConfig()
    trainer = train(config)
    lora = trainer.folder / "lora"
    text = ModelCard.load(lora / "README.md").text
    text = text.replace("the base model", str(tiny_flux)).replace("this folder or repository", str(lora))
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (peft_line,) = re.findall(r"`(PeftModel.*?)`", text)

    def updates(transformer, adapter):
        layers = {name: m for name, m in transformer.named_modules() if isinstance(m, LoraLayer)}
        return {
            n: m.scaling[adapter] * (m.lora_B[adapter].weight.float() @ m.lora_A[adapter].weight.float())
            for n, m in layers.items()
        }

    expected = updates(trainer.module, "default")
    for line in ("", peft_line):
        scope = {"PeftModel": PeftModel}
        before, load, _ = re.split(r"^(pipeline\.load_lora.*\n)", snippet, flags=re.MULTILINE)
        code = before + (line or load)
        exec(code, scope)  # what a reader of the card would run
        transformer = scope["pipeline"].transformer
        found = updates(transformer, next(iter(transformer.peft_config)) if not line else "default")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0.05, atol=value.abs().max().item() / 50)  # bf16


@pytest.mark.parametrize("over_base", [False, True])
@pytest.mark.parametrize("kind", WRITE)
def test_the_cards_script_ends_with_a_picture(kind, over_base, tmp_path, monkeypatch):
    """As it stands there, and so does the command below it; sizes and steps are made small from outside."""
    backbone = BACKBONE.get(kind, kind)
    lora = write_random_lora(load(kind, WRITE[kind](tmp_path / "model")), tmp_path / "lora")
    shutil.copytree(lora, tmp_path / "base-lora")
    base = {"base_lora": "somewhere/base.safetensors", "base_lora_scale": 0.5} if over_base else {}
    text = _use(ModelConfig(path="-", backbone=backbone, **base), None)
    for here in ("this folder or repository", "this folder"):
        text = text.replace(here, str(lora))
    text = text.replace("the base model", str(tmp_path / "model"))
    for name in ("cat.png", "cup.png"):
        Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    given = {}

    def small(pipeline, *arguments, **named):
        given.update(named)
        own = {"max_area": 64 * 64, "_auto_resize": False} if kind == "kontext" else {}
        return call(pipeline, *arguments, **{"num_inference_steps": 1, "height": 64, "width": 64, **own, **named})

    from_pretrained = DiffusionPipeline.from_pretrained

    def loaded(path, **named):  # torchvision is not there
        parts = {"processor": ImageTextProcessor.from_pretrained(path, subfolder="processor")} if kind == "qwen" else {}
        return from_pretrained(path, **named, **parts)

    pipeline = BACKBONES[backbone].pipelines[1 if kind == "klein" else 0]
    call = pipeline.__call__
    monkeypatch.setattr(pipeline, "__call__", small)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", loaded)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", 64 * 64)
    exec(script, {})
    assert Image.open(tmp_path / "picture.png").size == (64, 64) and ("image" in given) == (kind != "flux")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    _, *words = shlex.split(command)
    config = parse_config([*words, "--size", "64x64"])[1]
    assert (config.model.path, config.model.backbone, config.lora) == (str(tmp_path / "model"), backbone, str(lora))
    assert (config.model.base_lora, config.model.base_lora_scale) == (("base-lora", 0.5) if over_base else (None, 1.0))
    if kind in ("klein", "flux"):  # the others' references have a megapixel
        main([*words, "--size", "64x64", "--steps", "1", "--quiet"])
        assert Image.open(tmp_path / "samples" / "images" / "0001_0.png").size == (64, 64)


@pytest.mark.parametrize(("mask", "source"), [("focus", "policy"), ("focus", "reference"), ("prior", "policy")])
def test_card_says_why_errors_without_the_lora_move(config, mask, source):
    """They do where the mask that weights them is of the policy's features, and only there."""
    config.samples, config.max_steps, config.optim.lr = SamplesConfig(), 3, 0.3
    config.focus = dataclasses.replace(config.focus, mask=mask, feature_source=source)
    trainer = train(config)
    before, *_, after = read_metrics(trainer.folder / "validation.jsonl")
    moves = before["error/reference_win"] != pytest.approx(after["error/reference_win"], rel=1e-5)  # sums are rounded
    assert moves == (mask == "focus" and source == "policy")
    assert (MASK_MOVES.format("the hidden states") in (trainer.folder / "lora" / "README.md").read_text()) == moves


def test_card_of_a_hub_model_over_uno_without_held_out_pairs(config):
    config.samples, config.data.validation = SamplesConfig(), None
    trainer = train(config)
    config.model = ModelConfig(path="owner/model", base_lora="/secret/place/dit_lora.safetensors", base_lora_scale=0.5)
    write_model_card(config, trainer.folder, trainer.train_set, trainer.validation_set)
    card = ModelCard.load(trainer.folder / "lora" / "README.md")
    assert card.data.base_model == "owner/model" and 'from_pretrained("owner/model"' in card.text
    assert (
        'set_adapters(["base", "focusdpo"], [0.5, 1.0])' in card.text
        and "convert-lora dit_lora.safetensors base-lora" in card.text
    )
    assert "secret" not in card.content and "Held-out" not in card.text and "samples.png" not in card.text


class Hub(BaseHTTPRequestHandler):
    """The few endpoints of the hub that an upload asks."""

    def answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            if self.headers["Authorization"] != "Bearer good":
                return self.answer({"error": "Invalid user token."}, 401)
            auth = {"accessToken": {"role": self.server.role}}
            return self.answer({"type": "user", "name": "me", "orgs": [{"name": "lab"}], "auth": auth})
        return self.answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer({"url": f"{constants.ENDPOINT}/me/mine", "id": "me/mine"})
        if self.path.endswith("/preupload/main"):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.answer({"files": files})
        if "/commit/main" in self.path:
            if self.server.broken:
                return self.answer({"error": "the disk is full"}, 507)
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            return self.answer({"commitUrl": f"{constants.ENDPOINT}/me/mine/commit/1", "commitOid": "1", "success": True})
        return self.answer({"errors": [], "warnings": []})  # /api/validate-yaml

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.files, server.broken, server.role = [], {}, False, "write"
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "good")
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_upload(config, server):
    config.push_to_hub = HubConfig(repo_id="me/mine")
    config.samples = SamplesConfig()
    lora = train(config).folder / "lora"
    assert [(new["name"], new["visibility"]) for new in server.created] == [("mine", "private")]
    files = [file for file in lora.rglob("*") if file.is_file()]
    assert server.files == {file.relative_to(lora).as_posix(): file.read_bytes() for file in files}
    assert {"README.md", "pytorch_lora_weights.safetensors", "peft/adapter_config.json", "curves.png"} <= server.files.keys()


def test_a_failed_upload_loses_nothing(config, server):
    config.push_to_hub = HubConfig(repo_id="lab/mine", private=False)
    config.samples = SamplesConfig()
    server.broken = True
    trainer = Trainer(config)
    lora = re.escape(str(trainer.folder / "lora"))
    with pytest.raises(UploadError, match=rf"the upload failed \(.*507(.|\n)*hf upload lab/mine {lora} \.$"):
        trainer.train()
    assert (trainer.folder / "lora" / "README.md").is_file()
    assert (trainer.folder / "checkpoints" / "step-000001").is_dir()


def test_what_cannot_be_uploaded_is_refused_before_training(config, server, monkeypatch):
    for repo, message in {
        "mine": "expected owner/name",
        "me/not a name": "push_to_hub.repo_id: Repo id must",
        "you/mine": "'you' is not yours to write to; expected one of me, lab",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_hub(HubConfig(repo_id=repo))
    server.role = "read"
    with pytest.raises(ValueError, match="the token may only read"):
        check_hub(HubConfig(repo_id="me/mine"))
    monkeypatch.setenv("HF_TOKEN", "bad")
    config.push_to_hub = HubConfig(repo_id="me/mine")
    with pytest.raises(ValueError, match="the hub does not take this login .*run `hf auth login` again"):
        Trainer(config)
    monkeypatch.setattr(hub.HfApi, "whoami", lambda self: (_ for _ in ()).throw(hub.LocalTokenNotFoundError()))
    with pytest.raises(ValueError, match="not logged in to the hub; run `hf auth login`"):
        check_hub(HubConfig(repo_id="me/mine"))
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "good")
    with pytest.raises(ValueError, match="switched off by HF_HUB_OFFLINE"):
        check_hub(HubConfig(repo_id="me/mine"))
    assert not server.created and not Path(config.output_dir).exists()
