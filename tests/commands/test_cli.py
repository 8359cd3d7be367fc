"""The command line: every setting documented, every mistake refused by name before anything is loaded."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
import subprocess
import sys
import typing

import pytest

import focusdpo
from focusdpo.commands import cli, registry
from focusdpo.foundation.progress_bars import HIDDEN
from focusdpo.foundation.workers import Pool
from focusdpo.training.config import TrainConfig

MINIMAL = "model: {path: nobody/nothing}\ndata: {train: /nowhere}\noutput_dir: out\n"


@pytest.fixture
def yaml_file(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text(MINIMAL)
    return file


def settings(config_class, prefix=""):
    for name, kind in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(kind):
            yield from settings(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", config_class


def test_file_with_overrides(yaml_file):
    name, config = cli.parse_config(
        ["train", "--config", str(yaml_file), "--focus.tau", "0.25", "--lora.rank", "4", "--focus.layers", "[0, 2]"]
    )
    assert name == "train" and isinstance(config, TrainConfig)
    assert (config.focus.tau, config.lora.rank, config.focus.layers, config.model.path) == (0.25, 4, [0, 2], "nobody/nothing")
    assert config.focus.match_count == "reference" and config.loss.beta == 2000.0


def test_lists_as_separate_values(yaml_file):
    run = ["train", "--config", str(yaml_file)]
    _, config = cli.parse_config([*run, "--data.buckets", "1:1", "4:3", "--focus.layers", "0", "2", "--trackers", "wandb"])
    assert (config.data.buckets, config.focus.layers, config.trackers) == (["1:1", "4:3"], [0, 2], ["wandb"])
    _, config = cli.parse_config([*run, "--focus.layers", "all", "--data.buckets", '["1:1"]'])
    assert config.focus.layers == "all"
    lists = ["--layers", "3", "7", "--grids", "layers", "tau", "--tau", "0.05", "1"]
    _, grids = cli.parse_config(["ablate", "--config", "run", *lists])
    assert (grids.layers, grids.grids, grids.tau, grids.config) == (["3", "7"], ["layers", "tau"], [0.05, 1.0], "run")
    _, shown = cli.parse_config(["data", "show", "--out", "a.html", "pairs"])
    assert (shown.out, shown.path) == ("a.html", "pairs"), "an option that is no list takes one value"


@pytest.mark.parametrize(("text", "value"), [("prior", "prior"), ("40", 40), ("0.5", 0.5)])
def test_match_count_keeps_its_type(yaml_file, text, value):
    _, config = cli.parse_config(["train", "--config", str(yaml_file), "--focus.match_count", text])
    assert config.focus.match_count == value and type(config.focus.match_count) is type(value)


def test_help_documents_every_setting(capsys):
    with pytest.raises(SystemExit):
        cli.parse_config(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, config_class in settings(TrainConfig):
        assert f"--{name}" in text
        described = config_class.__doc__.split(f"{name.split('.')[-1]}: ", 1)
        assert len(described) == 2, f"{name} is not in the docstring"
        first_words = " ".join(described[1].split()[:2])
        assert first_words in text, f"{name}: its meaning is not in --help"


REFUSED = {
    "unknown option": (["--focus.tua", "1"], "unrecognized arguments: --focus.tua"),
    "unknown choice": (["--focus.mask", "all"], "focus.mask"),
    "wrong type": (["--max_steps", "many"], "max_steps"),
    "out of range": (["--focus.tau", "3"], "focus.tau: got 3.0; expected 0 to 1"),
    "negative": (["--optim.lr", "-1"], "optim.lr: got -1.0; expected a positive number"),
    "resolution": (["--data.resolution", "8"], "data.resolution: got 8; expected at least 16 pixels"),
    "fraction": (["--focus.match_count", "1.5"], "focus.match_count: got 1.5"),
    "smoothing": (["--loss.label_smoothing", "0.1", "--loss.loss_type", "ipo"], "loss.label_smoothing: got 0.1"),
    "a block twice": (["--focus.layers", "[0, 0]"], "focus.layers: got [0, 0]"),
    "ignored warm-up": (["--optim.scheduler", "constant", "--optim.warmup_steps", "5"], "optim.warmup_steps: got 5"),
    "bins": (["--focus.entropy_bins", "300"], "focus.entropy_bins: got 300; expected at most 256"),
    "sigma": (["--focus.entropy_sigma", "0.001"], "focus.entropy_sigma: got 0.001; expected at least 0.001241 with 32 bins"),
    "sigma for few bins": (
        ["--focus.entropy_bins", "2", "--focus.entropy_sigma", "0.03"],
        "focus.entropy_sigma: got 0.03; expected at least 0.038462 with 2 bins",
    ),
    "time": (["--loss.times", "0.2", "1.4"], "loss.times: got [0.2, 1.4]; expected at least one time, each from 0"),
    "no time": (["--loss.times", "[]"], "loss.times: got []; expected at least one time"),
    "distribution": (["--loss.times", "cosmap"], "loss.times"),
    "order": (["--loss.time_order", "round_robin"], "loss.time_order: got 'round_robin'; expected 'random' unless"),
    "mean of none": (
        ["--loss.times", "uniform", "--loss.logit_mean", "0.5"],
        "loss.logit_mean: got 0.5; expected 0 with loss.times='uniform'",
    ),
    "mu of nothing": (["--loss.sdpo_mu", "0.5"], "loss.sdpo_mu: got 0.5; expected 0 without loss.loser_scale"),
    "shift": (["--loss.shift", "0"], 'loss.shift: got 0.0; expected a positive number up to 1000, or "auto"'),
    "shift of nothing": (["--loss.shift", "flux"], "loss.shift"),
    "shifted list": (["--loss.times", "[0.2]", "--loss.shift", "3"], "loss.shift: got 3.0; expected 1 with a list"),
    "anchor": (["--loss.reference_anchor", ".inf"], "loss.reference_anchor: got .inf; expected a finite number"),
    "beta": (["--loss.beta", ".inf"], "loss.beta: got .inf; expected a finite number"),
    "resume and overwrite": (
        ["--resume", "latest", "--overwrite", "true"],
        "overwrite: got True; expected false together with",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(yaml_file, case, capsys):
    arguments, message = REFUSED[case]
    with pytest.raises(SystemExit) as stop:
        cli.parse_config(["train", "--config", str(yaml_file), *arguments])
    assert stop.value.code not in (0, None)
    assert message in f"{stop.value.code} {capsys.readouterr().err}"


def test_unknown_field_in_the_file_is_refused(yaml_file):
    yaml_file.write_text(MINIMAL + "focus: {tua: 0.1}\n")
    with pytest.raises(SystemExit) as stop:
        cli.parse_config(["train", "--config", str(yaml_file)])
    assert f"{yaml_file}:4: focus.tua: is no setting; did you mean focus.tau?" in stop.value.code


def test_missing_dataset_is_an_error_without_traceback(yaml_file, tmp_path):
    """In a process of its own, as a user has it; also shows that no model is loaded before the data is looked at."""
    run = subprocess.run(
        [sys.executable, "-m", "focusdpo", "train", "--config", str(yaml_file), "--output_dir", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "focusdpo train: error: no such dataset: /nowhere" in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_commands_of_two_words(tmp_path, capsys):
    name, config = cli.parse_config(["data", "shard", "pairs", "out", "--pairs_per_shard", "7"])
    assert (name, config.source, config.out_dir, config.pairs_per_shard) == ("data shard", "pairs", "out", 7)
    file = tmp_path / "shard.yaml"
    file.write_text("pairs_per_shard: 5\n")
    assert cli.parse_config(["data", "shard", "pairs", "out", "--config", str(file)])[1].pairs_per_shard == 5
    for arguments, message in (
        (["data"], "one of {validate,"),
        (["data", "shred"], "'shred'"),
        (["data", "shard", "pairs"], "are required: OUT_DIR"),
    ):
        with pytest.raises(SystemExit):
            cli.parse_config(arguments)
        assert message in capsys.readouterr().err
    for arguments in (["data", "--help"], ["data", "shard", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.parse_config(arguments)
        assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "Write preference pairs as WebDataset shards." in shown
    assert "usage: focusdpo data shard SOURCE OUT_DIR" in " ".join(shown.split())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_setting_of_every_command_is_described(name, capsys):
    with pytest.raises(SystemExit):
        cli.parse_config([*name.split(), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for setting, config_class in settings(cli.COMMANDS[name].config_class):
        described = config_class.__doc__.split(f"{setting.split('.')[-1]}: ", 1)
        assert len(described) == 2, f"{setting} is not in the docstring"
        assert " ".join(described[1].split()[:2]) in text, f"{setting}: its meaning is not in --help"


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("train", "--model.path, --data.train, --output_dir"),
        ("train --model.path x --output_dir y", "--data.train"),
        ("evaluate --images x", "--manifest"),
        ("masks", "--config"),
        ("data build --scenes x", "--output_dir"),
        ("data dreambench", "--root"),
        ("convert-lora", "SOURCE, OUT_DIR"),
        ("data validate", "PATH"),
        ("report --out x", "RUN_DIR"),
        ("stress --model.backbone flux2", "--model.path"),
        ("ablate --config run --tau", None),
        ("stress --cpu --seed", None),
        ("stress --model.path", None),
    ],
)
def test_what_is_missing_is_called_as_one_types_it(words, missing, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse_config(words.split())
    last = f"error: the following arguments are required: {missing}"
    if missing is None:
        last = f"error: argument {words.split()[-1]}: expected one argument"
    assert stop.value.code == 2 and capsys.readouterr().err.splitlines()[-1] == last


def test_a_switch_needs_no_value(tmp_path):
    _, config = cli.parse_config(["ablate", "--gradients", "--config", "run", "--overwrite"])
    assert config.gradients and config.overwrite
    assert not cli.parse_config(["ablate", "--gradients", "false", "--config", "run"])[1].gradients


def test_every_name_in_the_table_is_there():
    """Each command in a file of its name, as whoever looks for it expects."""
    for name, command in cli.COMMANDS.items():
        module, _, function = command.preparation.partition(":")
        assert (module.split(".")[-1], function) == (name.replace(" ", "_").replace("-", "_"), "prepare")
        assert importlib.util.find_spec(module) is not None and dataclasses.is_dataclass(command.config_class)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"focusdpo {focusdpo.__version__}\n"


def test_print_config_is_a_file_to_start_from(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.parse_config(["data", "build", "--scenes", "x", "--output_dir", "y", "--seed", "3", "--quiet", "--print_config"])
    file = tmp_path / "build.yaml"
    file.write_text(capsys.readouterr().out)
    assert cli.parse_config(["data", "build", "--config", str(file)])[1].seed == 3


def test_quiet_leaves_warnings_and_results():
    script = (
        "import logging, sys\n"
        "from tqdm.auto import tqdm\n"
        "from focusdpo.commands import cli\n"
        "from focusdpo.foundation import progress_bars\n"
        "progress_bars.EVERY = 0.0\n"
        "def work():\n"
        "    list(tqdm(range(3), disable=False))\n"
        "    logging.getLogger('focusdpo.x').info('an info')\n"
        "    logging.getLogger('focusdpo.x').warning('a warning')\n"
        "    print('a result')\n"
        "sys.modules['focusdpo.commands.report'] = type(sys)('report')\n"
        "sys.modules['focusdpo.commands.report'].prepare = lambda config: work\n"
        "cli.main()"
    )
    loud, quiet = (
        subprocess.run([sys.executable, "-c", script, "report", *words, "x"], capture_output=True, text=True)
        for words in ([], ["--quiet"])
    )
    assert (loud.stdout, quiet.stdout, quiet.stderr) == ("a result\n", "a result\n", "WARNING: a warning\n")
    assert "3/3" in loud.stderr and "INFO: an info" in loud.stderr


def is_hidden(_):
    from tqdm.auto import tqdm

    with tqdm(range(3), disable=False) as bar:
        return bar.disable


def test_quiet_holds_for_workers(monkeypatch):
    monkeypatch.setitem(os.environ, HIDDEN, "1")
    with Pool(1, is_hidden) as pool:
        assert list(pool.run([0])) == [(0, True)]


def test_tab_completion():
    """In bash, with the script that --completion prints."""
    pytest.importorskip("shtab")
    script = subprocess.check_output([sys.executable, "-m", "focusdpo", "--completion", "bash"], text=True)
    assert "complete -o bashdefault -o default -F" in script
    words = (["focusdpo", "data", "b"], ["focusdpo", "train", "--focus.mask", "pr"], ["focusdpo", "train", "--optim.we"])
    for asked, completed in zip(words, ("build", "prior", "--optim.weight_decay"), strict=True):
        ask = f'COMP_WORDS=({" ".join(asked)}); COMP_CWORD={len(asked) - 1}; _shtab_focusdpo focusdpo; echo "${{COMPREPLY[@]}}"'
        shell = subprocess.run(["bash"], input=f"{script}\n{ask}\n", capture_output=True, text=True)
        assert (shell.stdout.split(), shell.stderr) == ([completed], "")


@pytest.mark.skipif(importlib.util.find_spec("shtab") is not None, reason="shtab is installed")
def test_tab_completion_says_what_it_needs(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--completion", "bash"])
    assert capsys.readouterr().err.endswith("pip install 'focusdpo[completion]'\n")


def test_no_garbage_is_looked_for_while_a_command_is_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_a_command.py").write_text("import gc\ncollects, kept = gc.isenabled(), [[]]\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ZeroDivisionError):
            registry._imported("broken:prepare")
        assert gc.isenabled() and gc.get_freeze_count() == frozen
        assert registry._imported("of_a_command:collects") is False and gc.isenabled()
        assert gc.get_freeze_count() > frozen, "what was imported stays"
        gc.unfreeze()
        assert registry._imported("of_a_command:kept") == [[]] and gc.get_freeze_count() == 0, "and nothing that comes later"
        gc.disable()
        del sys.modules["of_a_command"]
        assert registry._imported("of_a_command:collects") is False and not gc.isenabled(), "switched off it stays so"
    finally:
        gc.enable()
        sys.modules.pop("of_a_command", None)
