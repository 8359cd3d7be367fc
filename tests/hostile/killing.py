"""Kills a command at one file operation after another: `python -m tests.hostile.killing CASE FOLDER [long]`.

The command first runs to its end, in a folder of its own. Then a fork of this process, which spares it the seconds of
importing, runs it again and dies by SIGKILL just before its n-th operation on files: opening one to write, renaming, deleting,
making a folder. What it left is looked at; then it is run once more, as a user would, and has to come to the same files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate.state import AcceleratorState, GradientState

from focusdpo.commands import cli

EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}
MINE = {"notes.txt": "mine", "out/notes.txt": "mine", "out/images/holiday.png": "mine", "out/lora/notes.txt": "mine"}
# What has the clock, a random name, an order of storages, or a hash of such in it.
CLOCK = re.compile(
    r"report\.json|environment\.json|events\.out\..*|curves\.png|thumbnails-\w+/.*|.*\.html|README\.md|state\.pt|random_states_0\.pkl|checksums\.json"
)


@dataclass(frozen=True)
class Case:
    """A command, and what goes on after a kill.

    make: writes what it reads, into the working folder. sound: what has to hold whenever it is killed. kills: how many, evenly
    over all operations; None is at each of them. long: how many where time does not matter.
    """

    make: Callable[[Path], None]
    command: list[str]
    again: list[str]
    kills: int | None = None
    long: int | None = None
    sound: Callable[[Path], None] = lambda folder: None


def operations(limit: int | None) -> Callable[[], int]:
    """Counts from now on what this process does to files, and dies before operation number `limit`."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event == "open":
            mode, flags = arguments[1], arguments[2]
            writes = (
                any(c in mode for c in "wax+") if isinstance(mode, str) else bool(int(str(flags)) & (os.O_WRONLY | os.O_RDWR))
            )
            if not writes or str(arguments[0]).startswith(("/dev/", "/proc/")):
                return
        elif event not in EVENTS:
            return
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count


def run(command: list[str]) -> None:
    try:
        cli.main(command)
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise RuntimeError(f"{command}: {stop.code}") from stop
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def forked(folder: Path, command: list[str], limit: int | None) -> tuple[int, int]:
    """Status and number of operations of a command in a process of its own."""
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        with (folder.parent / f"{folder.name}.log").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            count = operations(limit)
            code = 1
            try:
                run(command)
                code = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
            (folder.parent / "count").write_text(str(count()))
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return status, 0 if os.WIFSIGNALED(status) else int((folder.parent / "count").read_text())


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in (folder / "out").rglob("*") if path.is_file())
    named = {path.relative_to(folder / "out").as_posix(): path for path in files}
    return {
        name: _content(path, folder)
        for name, path in named.items()
        if ".focusdpo" not in name.split("/") and not any(CLOCK.fullmatch(name[i:]) for i in _starts(name))
    }


def _starts(name: str) -> list[int]:
    return [0, *(match.end() for match in re.finditer("/", name))]


def _content(path: Path, folder: Path) -> bytes:
    """Without the clock's numbers and the folder in it, and a build's outcomes in any order."""
    content = path.read_bytes()
    if path.name == "manifest.jsonl":
        return b"\n".join(sorted(content.splitlines()))
    if path.suffix in (".yaml", ".json"):  # settings of a start
        return re.sub(rb'resume: .*|"?overwrite"?: \w+', b"", content.replace(os.fsencode(folder), b""))
    return re.sub(rb'"(pairs_per_second|peak_memory_mib)": [^,}]*', b"", content) if path.suffix == ".jsonl" else content


def main(name: str, root: Path, is_long: bool) -> None:
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(1)  # its pool of threads would not come along into a fork
    case = CASES[name]
    template = root / "template"
    template.mkdir()
    case.make(template)
    for file, text in MINE.items():
        (template / file).parent.mkdir(parents=True, exist_ok=True)
        (template / file).write_text(text)
    whole = root / "whole"
    shutil.copytree(template, whole)
    os.chdir(whole)
    run(case.command)
    expected = tree(whole)
    counted = root / "counted"
    shutil.copytree(template, counted)
    status, total = forked(counted, case.command, None)
    if status or tree(counted) != expected:
        raise SystemExit(f"two whole runs differ: {difference(tree(counted), expected)}")
    places = range(1, total + 1)
    kills = case.long if is_long else case.kills
    if kills is not None and kills < total:
        places = sorted({1 + round((i + 0.5) * (total - 1) / kills) for i in range(kills)})
    for place in places:
        folder = root / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        status, _ = forked(folder, case.command, place)
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"the command ended before operation {place}")
        case.sound(folder)
        status, _ = forked(folder, case.again, None)
        if status:
            raise SystemExit(f"killed at operation {place}: {(root / 'killed.log').read_text()[-2000:]}")
        case.sound(folder)
        if tree(folder) != expected:
            raise SystemExit(f"killed at operation {place}: {difference(tree(folder), expected)}")
        if any((folder / file).read_text() != text for file, text in MINE.items()):
            raise SystemExit(f"killed at operation {place}: a foreign file is lost")
    print(f"{name}: killed at {len(places)} of {total} operations")


def difference(found: dict[str, bytes], expected: dict[str, bytes]) -> str:
    names = sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name))
    sides = {name: "lacks" if name not in found else "has too much" if name not in expected else "differs in" for name in names}
    return ", ".join(f"{side} {name}" for name, side in sides.items())


# What the commands read.


def make_pairs(folder: Path, count: int = 2) -> None:
    from focusdpo.demo.scenes import write_dataset

    write_dataset(folder / "pairs", count, 64, seed=0)


def make_page(folder: Path) -> None:
    """With an earlier page of other pairs."""
    make_pairs(folder)
    os.chdir(folder)
    run(["data", "show", "pairs", "--out", "out/page.html", "--size", "32"])


def make_uno(folder: Path) -> None:
    make_pairs(folder)
    lines = [json.loads(line) for line in (folder / "pairs" / "pairs.jsonl").read_text().splitlines()]
    rows = [
        {"prompt": line["prompt"], "image_paths": [r["image"] for r in line["references"]], "image_tgt_path": line["winner"]}
        for line in lines
    ]
    (folder / "pairs" / "uno.json").write_text(json.dumps(rows))
    (folder / "losers").mkdir()
    for line in lines:
        shutil.copy(folder / "pairs" / line["loser"], folder / "losers" / line["winner"])


def make_scenes(folder: Path) -> None:
    from tests.demo_scenes import write_scenes

    write_scenes(folder / "scenes", 2, 96, seed=1)


def make_lora(folder: Path) -> None:
    from safetensors.torch import save_file

    layer = "transformer.transformer_blocks.0.attn.to_q"
    sides = {f"{layer}.lora_A.weight": torch.ones(2, 8), f"{layer}.lora_B.weight": torch.ones(8, 2)}
    save_file(sides, folder / "lora.safetensors")


def make_sampled(folder: Path) -> None:
    """A run that has not begun, and a LoRA for its model."""
    from tests.sampling.studies import load, write_random_lora

    make_run(folder)
    write_random_lora(load("flux", folder / "model"), folder / "lora")


def make_run(folder: Path) -> None:
    """Settings of a run with everything that writes: samples, a cache, a moving average, and few checkpoints."""
    from focusdpo.models.tiny_flux import write_tiny_flux
    from focusdpo.training.config import DataConfig, LoraConfig, ModelConfig, OptimConfig, SamplesConfig, TrainConfig

    make_pairs(folder)
    write_tiny_flux(folder / "model")
    data = DataConfig(
        train="pairs", validation="pairs", resolution=32, reference_resolution=32, num_workers=0, check="headers", cache="cache"
    )
    config = TrainConfig(
        model=ModelConfig(path="model", dtype="fp32", max_sequence_length=16, gradient_checkpointing=False),
        data=data,
        output_dir="out",
        lora=LoraConfig(rank=1, alpha=1, target_modules=["to_q"]),
        optim=OptimConfig(lr=1e-3, ema_decay=0.5),
        samples=SamplesConfig(every=3, count=1, steps=1),
        max_steps=3,
        mixed_precision="no",
        checkpoint_every=1,
        checkpoints_total_limit=1,
        validate_every=3,
        backend="torch",
        cpu=True,
    )
    (folder / "train.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))


def make_finished_run(folder: Path) -> None:
    from tests.synthetic_run import write_run, write_samples

    write_run(folder / "run", 20)
    write_samples(folder / "run", [0, 10], 1)


def make_photos(folder: Path) -> None:
    """Three subjects in DreamBench's format, and UNO's lists of them."""
    from tests.photo_folder import KNOWN, write_photos

    shown = {f"subject{index}": KNOWN["espresso cup"].recoloured(index / 3) for index in range(3)}
    root = write_photos(folder / "photos", shown, 2, 192)
    (root / "prompts_and_classes.txt").write_text("subject_name,class\n" + "".join(f"subject{i},class0\n" for i in range(3)))
    for name, groups in (("single", [[0], [1], [2]]), ("multi", [[0, 1], [1, 2]])):
        items = [{"prompt": "it", "image_paths": [f"subject{subject}/01.jpg" for subject in group]} for group in groups]
        (root / f"dreambench_{name}ip.json").write_text(json.dumps(items))


def make_study(folder: Path) -> None:
    """A manifest, two images for each of its prompts, and an encoder."""
    from focusdpo.demo.scenes import write_dataset
    from tests.tiny_vision import write_tiny_features

    write_tiny_features(folder / "dino")
    write_dataset(folder / "pairs", 2, 64, seed=0)
    (folder / "images").mkdir()
    for line in (1, 2):
        for number, part in enumerate(("winner", "loser")):
            shutil.copy(folder / "pairs" / f"{line - 1:04d}_{part}.png", folder / "images" / f"{line}_{number}.png")


def page_is_whole(folder: Path) -> None:
    """It and every thumbnail that it names."""
    page = folder / "out" / "page.html"
    text = page.read_text()
    if not text.rstrip().endswith("</html>"):
        raise SystemExit("half a page")
    from PIL import Image

    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    pictures = [picture for card in data["cards"] for picture in (*card["references"], *card["targets"])]
    names = [name for picture in pictures for name in picture[4:] if name is not None]
    if not names:
        raise SystemExit("a page without thumbnails")
    for name in names:
        Image.open(folder / "out" / data["folder"] / name).load()


def report_is_whole(folder: Path) -> None:
    file = folder / "out" / "checked.json"
    if file.exists():
        json.loads(file.read_text())


TRAIN = ["train", "--config", "train.yaml"]
SHARD = ["data", "shard", "pairs", "out"]
IMPORT = ["data", "import", "pairs/uno.json", "out", "--losers", "losers"]
BUILD = ["data", "build", "--scenes", "scenes", "--output_dir", "out", "--resolution", "96"]
SHOW = ["data", "show", "pairs", "--out", "out/page.html", "--size", "64", "--overwrite", "true"]
VALIDATE = ["data", "validate", "pairs", "--json", "out/checked.json"]
DREAMBENCH = ["data", "dreambench", "--root", "photos", "--output_dir", "out", "--resolution", "96", "--pairs", "6"]
EVALUATE = ["evaluate", "--images", "images", "--manifest", "pairs/pairs.jsonl", "--output_dir", "out", "--dino", "dino"]
MASKS = [
    "masks",
    "--config",
    "train.yaml",
    "--out",
    "out",
    "--checkpoint",
    "none",
    "--layer_groups",
    "1",
    "--timesteps",
    "[0.5]",
]
SAMPLE = ["sample", "--config", "train.yaml", "--lora", "lora", "--manifest", "pairs/pairs.jsonl", "--output_dir", "out"]
SAMPLE += ["--steps", "1", "--images_per_prompt", "2", "--compare", "true"]
STRESS = [
    "stress",
    "--config",
    "train.yaml",
    "--checkpoint",
    "none",
    "--output_dir",
    "out",
    "--scenes",
    "2",
    "--resolution",
    "64",
]
STRESS += ["--reference_resolution", "32", "--timesteps", "[0.5]", "--resamples", "100"]
ABLATE = ["ablate", "--config", "train.yaml", "--output_dir", "out", "--variants", "base", "dpo", "--max_steps", "2"]
ABLATE += ["--points", "1", "--seeds", "[0]", "--times", "[0.5]"]
DEMO = ["demo", "--out", "out", "--pairs", "2", "--held_out", "1", "--steps", "2", "--resolution", "64", "--overlays", "1"]
DEMO += ["--batch_size", "1", "--backend", "torch"]
CONVERT = ["convert-lora", "lora.safetensors", "out", "--to", "peft", "--backbone", "flux"]
CASES = {
    "shard": Case(make_pairs, SHARD, [*SHARD, "--overwrite", "true"]),
    "import": Case(make_uno, IMPORT, [*IMPORT, "--overwrite", "true"]),
    "build": Case(make_scenes, BUILD, BUILD, kills=30, long=30),
    "show": Case(make_page, SHOW, SHOW, kills=12, sound=page_is_whole),
    "validate": Case(make_pairs, VALIDATE, VALIDATE, sound=report_is_whole),
    "convert": Case(make_lora, CONVERT, [*CONVERT, "--overwrite", "true"]),
    "report": Case(
        make_finished_run,
        ["report", "run", "--out", "out/page.html"],
        ["report", "run", "--out", "out/page.html", "--overwrite", "true"],
        kills=8,
    ),
    "dreambench": Case(make_photos, DREAMBENCH, DREAMBENCH, kills=8, long=8),
    "evaluate": Case(make_study, EVALUATE, [*EVALUATE, "--overwrite", "true"], kills=8, long=8),
    "masks": Case(make_run, MASKS, [*MASKS, "--overwrite", "true"], kills=3, long=5),
    "sample": Case(make_sampled, SAMPLE, SAMPLE, kills=6, long=20),
    "stress": Case(make_run, STRESS, STRESS, kills=2, long=3),
    "ablate": Case(make_run, ABLATE, ABLATE, kills=0, long=3),
    "demo": Case(lambda folder: None, DEMO, [*DEMO, "--overwrite", "true"], kills=0, long=1),
    "train": Case(make_run, TRAIN, [*TRAIN, "--resume", "latest"], kills=5, long=8),
}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), is_long=len(sys.argv) > 3)
