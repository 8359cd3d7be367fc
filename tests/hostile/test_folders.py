"""Whose files are these? Only what a command wrote is replaced or deleted, and one process writes at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from focusdpo.commands import cli
from focusdpo.foundation.files import HOST, writing, writing_folder
from focusdpo.foundation.output_folder import OutputFolder, free_name, step_folders, under
from focusdpo.training.config import SamplesConfig
from focusdpo.training.run_folder import finished_at
from focusdpo.training.trainer import Trainer
from tests import PATIENCE
from tests.hostile import SMALL
from tests.processes import started
from tests.runs import train

PATTERNS = (r"result\.json", r"log\.jsonl", r"images/\d+\.png", r"cache/run-\w+/**")
HINT = "say so"

SETTINGS = SMALL


def folder_at(path, command="draw"):
    return OutputFolder("out", path, command, PATTERNS)


def write(path, files):
    for name, text in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


OWN = {"result.json": "{}", "log.jsonl": "{}\n", "images/0.png": "one", "cache/run-a/deep/file": "tool's"}


def work(path, overwrite=False):
    out = folder_at(path)
    out.check(overwrite, HINT)
    out.begin(clear=True)
    with out:
        write(path, OWN)


def names(path):
    found = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return sorted(name for name in found if not name.startswith(".focusdpo/"))


@pytest.fixture
def done(tmp_path):
    work(tmp_path / "out")
    return tmp_path / "out"


def test_only_what_was_written_is_deleted(done):
    mine = {"notes.txt": "a", "images/holiday.png": "b", "images/1/2.png": "c", "cache/thesis.txt": "d"}
    write(done, mine)
    with pytest.raises(
        FileExistsError, match=r"out: .* holds an earlier run \(cache, images, log.jsonl, result.json\); say so"
    ):
        folder_at(done).check(False, HINT)
    out = folder_at(done)
    out.check(True, HINT)
    out.begin(clear=True)
    assert names(done) == sorted(mine)
    out.finish()


IN_THE_WAY = {
    "another's file": lambda f: write(f, {"images/7.png": "mine"}),
    "a changed file": lambda f: write(f, {"result.json": "{ }"}),
    "a text of the same length": lambda f: write(f, {"result.json": "[]"}),
    "a tool's other run": lambda f: write(f, {"cache/run-b/file": "mine"}),
    "a folder for a file": lambda f: ((f / "result.json").unlink(), (f / "result.json").mkdir()),
    "a file for a folder": lambda f: (shutil.rmtree(f / "images"), (f / "images").write_text("mine")),
    "a link that leads nowhere": lambda f: (f / "images" / "8.png").symlink_to(f / "none"),
    "a link to another's file": lambda f: (
        (f / "result.json").unlink(),
        write(f.parent, {"mine": "{ }"}),
        (f / "result.json").symlink_to(f.parent / "mine"),
    ),
}


@pytest.mark.parametrize("case", IN_THE_WAY)
def test_what_is_in_the_way_is_named_and_stays(done, case):
    IN_THE_WAY[case](done)
    before = {path: path.lstat().st_mtime_ns for path in done.rglob("*") if ".focusdpo" not in path.parts}
    with pytest.raises(FileExistsError, match="out: .* which this command did not write, or which was changed since"):
        folder_at(done).check(True, HINT)
    assert {path: path.lstat().st_mtime_ns for path in done.rglob("*") if ".focusdpo" not in path.parts} == before


def test_what_comes_between_the_check_and_the_work_is_seen(done):
    out = folder_at(done)
    out.check(True, HINT)
    write(done, {"images/7.png": "mine"})
    with pytest.raises(FileExistsError, match="images/7.png"):
        out.begin(clear=True)
    assert (done / "images" / "0.png").read_text() == "one"


def test_another_commands_files_are_not_this_ones(done):
    other = OutputFolder("out", done, "draw more", PATTERNS)
    with pytest.raises(FileExistsError, match="which this command did not write"):
        other.check(True, HINT)


def test_what_a_kill_left_is_known(tmp_path):
    out = folder_at(tmp_path)
    out.check(False, HINT)
    out.begin(clear=True)
    halves = ("images/.5.png.partial", ".result.json.partial", ".log.jsonl.12.partial", f".log.jsonl.{HOST}-12.partial")
    write(tmp_path, OWN | {"notes": "mine"} | dict.fromkeys(halves, "half"))
    out.release()
    again = folder_at(tmp_path)
    assert again.is_unfinished
    again.check(True, HINT)
    again.begin(clear=True)
    assert names(tmp_path) == ["notes"]


def test_what_a_kill_left_of_a_shared_file_goes_and_what_another_writes_stays(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    stays = [f".page.html.{HOST}-{os.getppid()}.partial", f".page.html.elsewhere-{ended.pid}.partial"]
    write(tmp_path, dict.fromkeys([f".page.html.{HOST}-{ended.pid}.partial", *stays], "half"))
    with writing(tmp_path / "page.html", shared=True) as partial:
        partial.write_text("whole")
    assert names(tmp_path) == sorted([*stays, "page.html"])


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "kept" / "scene"

    def write_half():
        with writing_folder(folder) as partial:
            write(partial, {"half.png": "half"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert names(tmp_path) == [] and not folder.exists()
    write(folder, {"old.png": "old", "deep/other.png": "other"})
    with writing_folder(folder) as partial:
        write(partial, {"old.png": "new", "deep/new.png": "new"})
        assert (folder / "old.png").read_text() == "old"
    assert {name: (folder / name).read_text() for name in names(folder)} == {
        "old.png": "new",
        "deep/new.png": "new",
        "deep/other.png": "other",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["scene"]


@pytest.mark.parametrize("inner", [False, True])
def test_folders_that_are_links_work(tmp_path, inner):
    target = tmp_path / "elsewhere"
    target.mkdir()
    write(target, {"holiday.png" if inner else "images/holiday.png": "mine"})
    if inner:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "images").symlink_to(target)
    else:
        (tmp_path / "out").symlink_to(target)
    work(tmp_path / "out")
    work(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "images" / "holiday.png").read_text() == "mine" and target.is_dir()
    assert (tmp_path / "out" / ("images" if inner else "")).exists() and (tmp_path / "out" / "images" / "0.png").is_file()


def test_a_damaged_list_makes_nothing_ours(done):
    (done / ".focusdpo" / "draw.json").write_text('{"files": [1], "notes": ')
    with pytest.raises(FileExistsError, match="which this command did not write"):
        folder_at(done).check(True, HINT)


def test_a_folder_of_an_earlier_version(tmp_path):
    write(tmp_path, OWN)
    (tmp_path / ".focusdpo").write_text("Made by focusdpo; --overwrite may delete its files.\n")
    with pytest.raises(FileExistsError, match="an earlier version, which kept no list of its files"):
        folder_at(tmp_path).check(True, HINT)
    out = folder_at(tmp_path)
    out.check(False, HINT, goes_on=True)  # work that was begun there
    out.begin(clear=False)
    out.finish()
    assert folder_at(tmp_path).is_as_written("result.json", "images/0.png")


def test_what_people_edit_is_kept_when_work_goes_on(done):
    write(done, {"result.json": "edited", "log.jsonl": "damaged"})
    for expected in ("result.json.edited", "result.json.edited-2"):
        out = folder_at(done)
        out.check(False, HINT, goes_on=True, aside=("result.json",))
        out.begin(clear=False)
        assert (done / expected).read_text() == "edited"
        write(done, {"result.json": "{}"})
        out.finish()
        write(done, {"result.json": "edited"})
    assert (done / "log.jsonl").read_text() == "damaged", "who goes on reads it"


def test_edits_in_what_was_stopped_are_kept(tmp_path):
    """Whether it was killed, when a note has the hash of what was written, or stopped, when all that is there is listed."""
    out = folder_at(tmp_path)
    out.check(False, HINT)
    out.begin(clear=True)
    write(tmp_path, OWN)
    out.has_written("result.json")
    out.release()  # as by a kill
    for expected, content in (("result.json.edited", "[1]"), ("result.json.edited-2", "[2]")):
        write(tmp_path, {"result.json": content})
        out = folder_at(tmp_path)
        out.check(False, HINT, goes_on=True, aside=("result.json",))
        out.begin(clear=False)
        assert (tmp_path / expected).read_text() == content
        write(tmp_path, {"result.json": "{}"})
        with pytest.raises(KeyboardInterrupt), out:
            raise KeyboardInterrupt
    write(tmp_path, {"images/7.png": "mine"})
    again = folder_at(tmp_path)
    assert again.is_unfinished
    with pytest.raises(FileExistsError, match="images/7.png, which this command did not write"):
        again.check(True, HINT)


def test_links_that_a_tool_made_are_its_own(tmp_path):
    """As W&B's link to the latest run's folder is."""
    out = OutputFolder("out", tmp_path, "draw", (r"tool/(latest|log\.txt)", r"tool/run-\w+/**"))
    for overwrite in (False, True):
        out.check(overwrite, HINT)
        out.begin(clear=True)
        write(tmp_path, {"tool/run-a/log.txt": "a"})
        (tmp_path / "tool" / "latest").symlink_to("run-a")
        (tmp_path / "tool" / "log.txt").symlink_to("run-a/log.txt")
        out.finish()
    write(tmp_path, {"tool/run-a/log.txt": "more, after the end"})
    out.check(True, HINT)
    out.begin(clear=True)
    assert not (tmp_path / "tool").exists()


def test_a_list_of_somebody_else_reaches_nowhere(tmp_path):
    work(tmp_path / "out")
    write(tmp_path, {"victim": "abc"})
    file = tmp_path / "out" / ".focusdpo" / "draw.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "files": {**content["files"], "../victim": [3], "notes.txt": [3]}}))
    write(tmp_path / "out", {"notes.txt": "abc"})
    work(tmp_path / "out", overwrite=True)
    assert (tmp_path / "victim").exists() and (tmp_path / "out" / "notes.txt").exists()
    file.write_text(json.dumps({**content, "files": {"result.json": 3}}))
    with pytest.raises(FileExistsError, match="which this command did not write"):
        work(tmp_path / "out", overwrite=True)


def test_refusing_leaves_no_folder(tmp_path):
    out = folder_at(tmp_path / "a" / "b")
    out.check(False, HINT)
    assert (tmp_path / "a" / "b" / ".focusdpo" / "lock").exists()
    out.release()
    assert not (tmp_path / "a").exists()


PLACES = {
    "a file": (lambda p: p.write_text(""), NotADirectoryError, "is a file; name a folder"),
    "within a file": (lambda p: p.parent.rmdir() or p.parent.write_text(""), NotADirectoryError, "is a file; name a folder"),
    "a link that leads nowhere": (lambda p: p.symlink_to("none"), NotADirectoryError, "is a link that leads nowhere"),
    "a link to itself": (lambda p: p.symlink_to(p), NotADirectoryError, "link that leads nowhere"),
    "something else's": (
        lambda p: p.mkdir() or (p / ".focusdpo").write_text("mine"),
        FileExistsError,
        "is no folder of ",
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_what_can_be_no_folder(tmp_path, case):
    make, kind, message = PLACES[case]
    path = tmp_path / "a" / "b"
    path.parent.mkdir()
    make(path)
    with pytest.raises(kind, match=f"out: .*{message}"):
        folder_at(path).check(True, HINT)


def test_too_long_a_name(tmp_path):
    with pytest.raises(OSError, match="out: .*(name another|cannot be)"):
        folder_at(tmp_path / ("x" * 300)).check(True, HINT)


def test_names(tmp_path):
    for name in ("step-2", "step-000010", "step-best", "step-000002.good", "step-3.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-5").write_text("a file")
    assert [step for step, _ in step_folders(tmp_path)] == [2, 10]
    assert free_name(tmp_path / "new").name == "new" and free_name(tmp_path / "step-best").name == "step-best-2"
    assert under("runs", ["a"])[0] == "runs/a"


# One writer


HOLD = """
import sys, time
from pathlib import Path
from focusdpo.foundation.files import HOST, writing, writing_folder
from focusdpo.foundation.output_folder import OutputFolder
out = OutputFolder("out", Path(sys.argv[1]), "draw", [r"result\\.json"])
out.check(True, "")
out.begin(clear=False)
if sys.argv[2] == "forked":
    import os
    reads, writes = os.pipe()
    if os.fork() == 0:
        os.write(writes, b".")  # it has begun, and what is done at forks is done
        time.sleep(60)
        os._exit(0)
    os.read(reads, 1)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["alone", "forked"])
def test_another_process_waits_outside_until_death(tmp_path, kind):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), kind], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        message = rf"out: .* is being written by focusdpo draw, process {holder.pid} on .* since 2\d\d\d-"
        with pytest.raises(BlockingIOError, match=message):
            folder_at(tmp_path).check(True, HINT)
        holder.kill()
        holder.wait()
        folder_at(tmp_path).check(True, HINT)  # also while a child of it lives
    finally:
        holder.kill()
        holder.stdout.close()


def test_who_has_just_taken_the_lock_is_named(tmp_path):
    """Between taking it and saying so there is a moment, in which another process comes."""
    with started([sys.executable, "-c", HOLD, str(tmp_path), "alone"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "held\n"
        says = tmp_path / ".focusdpo" / "holder.json"
        said = says.read_bytes()
        says.unlink()
        timer = threading.Timer(0.3, says.write_bytes, [said])
        timer.start()
        with pytest.raises(BlockingIOError, match=f"is being written by focusdpo draw, process {holder.pid} on "):
            folder_at(tmp_path).check(True, HINT)
        timer.join()
        holder.kill()


# The commands


@pytest.fixture
def sampled(config):
    """The run with a held-out pair that is sampled."""
    config.data.validation = config.data.train
    return dataclasses.replace(config, samples=SamplesConfig(every=2, count=1, steps=1))


def test_a_run_keeps_what_is_not_its_own(sampled, tmp_path):
    config = sampled
    run = tmp_path / "run"
    train(config)
    assert finished_at(dataclasses.replace(config, resume="latest")) == 4
    assert finished_at(dataclasses.replace(config, resume="latest", max_steps=5)) is None
    for name in ("wandb/thesis.txt", "lora/notes.txt", "samples/step-000002.good/0.png", "samples/step-best/0.png", "steps/a"):
        write(run, {name: "mine"})
    (run / "checkpoints" / "step-000002" / "notes.txt").write_text("mine")
    # Going on from the second step sets the later checkpoint aside, and draws the later samples again.
    train(config, resume=str(run / "checkpoints" / "step-000002"))
    assert (run / "checkpoints" / "step-000004.abandoned").is_dir() and (run / "samples" / "step-000004" / "0.png").is_file()
    train(config, overwrite=True, checkpoints_total_limit=1)
    mine = [path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file() and path.read_bytes() == b"mine"]
    assert len(mine) == 6
    assert (
        not (run / "checkpoints" / "step-000004.abandoned").exists()
        and not (run / "checkpoints" / "step-000002" / "lora").exists()
    )
    # A changed result is not this run's any more.
    (run / "lora" / "README.md").write_text("# My LoRA")
    with pytest.raises(
        FileExistsError, match=r"run holds lora/README.md, which this command did not write, or which was changed"
    ):
        Trainer(dataclasses.replace(config, overwrite=True))
    assert finished_at(dataclasses.replace(config, resume="latest")) is None
    train(config, resume="latest", max_steps=6)
    assert (run / "lora" / "README.md.edited").read_text() == "# My LoRA"
    # Without its checkpoints it does not start over what they were of.
    shutil.move(run / "checkpoints", tmp_path / "moved")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(FileNotFoundError, match="resume: no checkpoint under .* though this run has written step-000006"):
        Trainer(dataclasses.replace(config, resume="latest"))
    assert (run / "metrics.jsonl").read_bytes() == before


def test_resume_where_another_tool_wrote(config, tmp_path):
    run = tmp_path / "run"
    for name in ("config.yaml", "samples/step-000001/0.png", "lora/pytorch_lora_weights.safetensors"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    for resume in ("latest", None):
        with pytest.raises(
            FileExistsError, match=r"run holds config.yaml, lora/pytorch_lora_weights.safetensors, samples/step-0"
        ):
            Trainer(dataclasses.replace(config, resume=resume))
    assert names(run) == ["config.yaml", "lora/pytorch_lora_weights.safetensors", "samples/step-000001/0.png"]
    assert all((run / name).read_text() == "mine" for name in names(run))


def test_two_runs_started_at_once(config, tmp_path):
    """One trains, the other is told who does; so do two that resume."""
    import yaml

    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "focusdpo", "train", "--config", str(file)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    results = [(process.communicate(timeout=PATIENCE)[1], process.returncode) for process in both]
    assert sorted(code for _, code in results) == [0, 1]
    refused = next(text for text, code in results if code)
    assert "output_dir: " in refused and "is being written by focusdpo train, process" in refused and "Traceback" not in refused
    done = subprocess.run([*command, "--resume", "latest"], capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert done.returncode == 0 and "training is done, at step 4 of 4" in done.stderr, done.stderr


def test_shards_beside_a_backup(tiny_pairs, tmp_path):
    pairs, out = str(tiny_pairs), tmp_path / "shards"
    cli.main(["data", "shard", pairs, str(out)])
    before = {file.name: file.read_bytes() for file in out.glob("*.tar")}
    (out / "backup.tar").write_text("mine")
    for overwrite in ("false", "true"):
        with pytest.raises(SystemExit, match=r"out_dir: .* holds other shards \(backup.tar\)"):
            cli.main(["data", "shard", pairs, str(out), "--overwrite", overwrite])
    (out / "backup.tar").unlink()
    cli.main(["data", "shard", pairs, str(out), "--overwrite", "true", "--pairs_per_shard", "3"])
    assert len(list(out.glob("*.tar"))) == 3 and not before.keys() & {file.name for file in out.glob("*.tar")}
    (out / "pairs-00000-of-00003.tar").write_text("mine")
    with pytest.raises(SystemExit, match=r"out_dir: .* holds pairs-00000-of-00003.tar, which this command did not write"):
        cli.main(["data", "shard", pairs, str(out), "--overwrite", "true"])


def test_a_report_never_takes_a_datasets_place(tiny_pairs, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(line.replace('"', '"') for line in tiny_pairs.read_text()))
    before = pairs.read_bytes()
    for name in ("pairs.jsonl", "notes.json"):
        (tmp_path / "notes.json").write_text("{}")
        with pytest.raises(SystemExit, match=f"json: .*{name} was not written by `focusdpo data validate`"):
            cli.main(["data", "validate", str(tiny_pairs), "--json", str(tmp_path / name)])
    assert pairs.read_bytes() == before and (tmp_path / "notes.json").read_text() == "{}"
    report = tmp_path / "report.json"
    for _ in range(2):
        cli.main(["data", "validate", str(tiny_pairs), "--json", str(report)])
    assert json.loads(report.read_text())["pairs"] == 8
    report.write_text(report.read_text().replace('"pairs": 8', '"pairs": 9'))
    with pytest.raises(SystemExit, match="or was changed since, and is left as it is"):
        cli.main(["data", "validate", str(tiny_pairs), "--json", str(report)])
    with pytest.raises(SystemExit, match="json: .* is a folder; name a file"):
        cli.main(["data", "validate", str(tiny_pairs), "--json", str(tmp_path)])
    with pytest.raises(SystemExit, match="json: .*pairs.jsonl is a file; name a file in a folder"):
        cli.main(["data", "validate", str(tiny_pairs), "--json", str(pairs / "report.json")])


def test_a_page_of_another_command(tiny_pairs, tmp_path):
    page = tmp_path / "page.html"
    cli.main(["data", "show", str(tiny_pairs), "--out", str(page), "--size", "16"])
    text = page.read_text().replace("data show", "report", 1)
    page.write_text(text)
    with pytest.raises(SystemExit, match="out: .*page.html was not written by `focusdpo data show`, or was changed since"):
        cli.main(["data", "show", str(tiny_pairs), "--out", str(page), "--overwrite", "true"])
    assert page.read_text() == text


def test_a_stopped_writer_lets_go(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "alone"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGTERM)
    holder.wait()
    holder.stdout.close()
    started = time.monotonic()
    folder_at(tmp_path).check(True, HINT)
    assert time.monotonic() - started < 60
    assert Path(tmp_path / ".focusdpo" / "draw.json").is_file()
