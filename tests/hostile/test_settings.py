"""Settings as strangers write them: null, wrong types, numbers that are none, YAML that is none or too much.

They are refused by name, in one line."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
import types
import typing

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from focusdpo.commands import cli
from focusdpo.foundation.settings_text import SettingError, read_option, read_settings
from focusdpo.training.config import TrainConfig
from focusdpo.training.run_files import read_run_config

MINIMAL = {"model": {"path": "nobody/nothing"}, "data": {"train": "/nowhere"}, "output_dir": "out"}
NAMES = ("train", "demo", "models", "evaluate", "microcosm", "stress", "ablate", "masks", "report", "data build", "data show")
NESTED = "[" * 30_000
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\xad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def walk(config_class, prefix=""):
    """Every setting and section with its type, by dotted name; not by the code under test."""
    for field in dataclasses.fields(config_class):
        kind = typing.get_type_hints(config_class)[field.name]
        yield f"{prefix}{field.name}", kind
        for one in (kind, *typing.get_args(kind)):
            if dataclasses.is_dataclass(one):
                yield from walk(one, f"{prefix}{field.name}.")


EVERY = [(command, name, kind) for command in cli.COMMANDS for name, kind in walk(cli.COMMANDS[command].config_class)]


def members(kind):
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def fits(value, kind):
    """Whether a value is of a type exactly: no truth value is a number, no number is infinite."""
    for one in members(kind):
        if typing.get_origin(one) is typing.Literal:
            if any(type(value) is type(choice) and value == choice for choice in typing.get_args(one)):
                return True
        elif typing.get_origin(one) is list:
            if isinstance(value, list) and all(fits(item, typing.get_args(one)[0]) for item in value):
                return True
        elif dataclasses.is_dataclass(one):
            known = typing.get_type_hints(one)
            if isinstance(value, dict) and all(name in known and fits(item, known[name]) for name, item in value.items()):
                return True
        elif type(value) is one and not (one is float and not math.isfinite(value)):
            return True
    return False


def nested(name, value):
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def refused(argv, *parts):
    """The message that a command ends with: one line without a traceback, in which all parts stand."""
    with pytest.raises(SystemExit) as stop:
        cli.parse_config([str(word) for word in argv])
    message = str(stop.value.code)
    assert message.startswith("focusdpo ") and "\n" not in message, message
    assert all(str(part) in message for part in parts), message
    return message


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "settings.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_null_is_refused_where_it_is_not_optional(command, file):
    about_a_run = cli.COMMANDS[command].about_a_run
    for name, kind in walk(cli.COMMANDS[command].config_class):
        optional = types.NoneType in members(kind)
        ways = [["--" + name, "null"], [f"--{name}=null"]]
        if not about_a_run:
            ways += [["--config", file(yaml.safe_dump(nested(name, None)))]]
        for way in ways:
            if optional:
                assert read_option(name, ["null"], kind) is None
                if not about_a_run:
                    assert read_settings(ways[-1][1], cli.COMMANDS[command].config_class) == nested(name, None)
            else:
                refused([*command.split(), *way], f"{name}: got null; expected ")


@pytest.mark.parametrize("spelled", ["null", "~", "", "NULL"])
def test_every_way_to_write_nothing(file, spelled):
    for name, value in (("optim", spelled), ("focus", f"{{tau: {spelled} }}"), ("mixed_precision", spelled)):
        path = file(f"seed: 1\n{name}: {value}\n")
        refused(["train", "--config", path], f"{path}:2: {name}", "got null; expected ")


BAD_NUMBERS = ("inf", "-inf", ".inf", "-.INF", "nan", ".nan", "Infinity", "1e999", "-1e400", "true", "1,5", "0x", "1e", "٣")


@pytest.mark.parametrize("text", BAD_NUMBERS)
def test_numbers_that_are_not_finite_are_refused_everywhere(text, file):
    for command, name, kind in EVERY:
        if float in members(kind) and str not in members(kind):
            message = f"{name}: got {text}; expected "
            section, _, last = name.rpartition(".")
            content = f"{section}:\n  {last}: {text}\n" if section else f"{name}: {text}\n"
            with pytest.raises(SettingError, match=f"^{message}"):
                read_option(name, [text], kind)
            with pytest.raises(SettingError, match=rf":\d: {message}"):
                read_settings(file(content), cli.COMMANDS[command].config_class)
    refused(["train", "--optim.lr", text], f"optim.lr: got {text}; expected a finite number")


@pytest.mark.parametrize("number", [2**70, -(2**70), 10**30])
def test_absurd_whole_numbers(number, file):
    for command, name, kind in EVERY:
        if members(kind) in ((int,), (int, types.NoneType)):
            with pytest.raises(SettingError, match=f"{name}: got {number}; expected a whole number"):
                read_option(name, [str(number)], kind)
            with pytest.raises(SettingError, match=f"{name}: got {number}; expected a whole number"):
                read_settings(file(json.dumps(nested(name, number))), cli.COMMANDS[command].config_class)
    refused(["demo", "--seed", "1" * 5000], "seed: got 1111", "…; expected a whole number")
    refused(["demo", "--seed", "0x" + "f" * 5000], "seed: got 0xffff")


REQUIRED = {
    "demo": [],
    "models": [],
    "train": ["--model.path", "x", "--data.train", "x", "--output_dir", "x"],
    "evaluate": ["--images", "x", "--manifest", "x", "--clip", "x"],
    "microcosm": [],
    "stress": ["--config", "x"],
    "ablate": ["--config", "x"],
    "masks": ["--config", "x"],
    "report": ["x"],
    "data build": ["--scenes", "x", "--output_dir", "x"],
    "data show": ["x"],
    "data shard": ["x", "x"],
    "data validate": ["x"],
}


@pytest.mark.parametrize("command", REQUIRED)
def test_negative_counts_are_named(command):
    """Each whole number that is a setting of this command, as -1: none has a use for it."""
    for name, kind in walk(cli.COMMANDS[command].config_class):
        if int in members(kind) and not name.startswith("model.") and name != "loss.mask_power":
            extra = ["--data.validation", "x"] if name.startswith("samples.") else []
            refused([*command.split(), *REQUIRED[command], *extra, f"--{name}=-1"], f"{name.split('.')[-1]}: got -1")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("seed: 1\nseed: 2\n", [":2: seed: stands twice"]),
        ("optim:\n  lr: 1\n  eps: 1\n  lr: 2\n", [":4: optim.lr: stands twice"]),
        ("optim: {lr: 1, 'lr': 2}\n", [":1: optim.lr: stands twice"]),
        ("- seed\n", [":1: got a list; expected settings"]),
        ("seed\n", [":1: got seed; expected settings"]),
        ("", [": got nothing; expected settings"]),
        ("# only this\n", [": got nothing; expected settings"]),
        ("seed: 1\n---\nseed: 2\n", [":3: holds several documents"]),
        ("seed: 1\noptim:\n\tlr: 1\n", [":3: is not YAML"]),
        ("seed: [1\n", ["is not YAML"]),
        ("seed: !!python/object/apply:os.system [ls]\n", [":1: has the tag tag:yaml.org,2002:python/object/apply:os.system"]),
        ("seed: !!int 5\n", [":1: has the tag"]),
        ("seed: *other\n", [":1: *other stands for nothing before it"]),
        ("optim: &it {lr: *it}\n", ["*it stands for nothing before it"]),
        ("seed: 1\x00\n", ["is not YAML"]),
        ("sed: 1\n", [":1: sed: is no setting; did you mean seed?"]),
        ("1: 1\n", [":1: 1: is no setting; known are model, data"]),
        ("[a]: 1\n", ["is no setting"]),
        ("{a: b}: 1\n", ["is no setting"]),
        ("optim: {<<: {lr: 1}}\n", ["optim.<<: is no setting"]),
        ("optim: [1]\n", [":1: optim: got a list; expected a section with optimizer, lr"]),
        ("seed: {a: 1}\n", ["seed: got a section; expected a whole number"]),
        ("run_name: [a]\n", ["run_name: got a list; expected a text or null"]),
        ("project: null\n", ["project: got null; expected a text; in quotes it is a text"]),
        ("mixed_precision: off\n", ["mixed_precision: got off; expected 'no' or 'bf16'"]),
        ("cpu: 1\n", ["cpu: got 1; expected true or false"]),
        ("loss: {mask_power: true}\n", ["loss.mask_power: got true; expected 1 or 2"]),
        ("seed: 1.0\n", ["seed: got 1.0; expected a whole number"]),
        ("seed: [[[]]]\n", ["seed: got a list"]),
        ("run_name: \x1b[2J\n", ["is not YAML"]),
        ('focus: {mask: "a\\e[2Jb\\nfocusdpo train: training may start"}\n', ["focus.mask: got 'a\\x1b[2Jb\\nfocusdpo"]),
        ("seed: 1\n".encode("utf-16"), ["is not UTF-8 text (byte 0)"]),
        (bytes(range(256)), ["is not UTF-8 text"]),
        (b"\x00\x01\x02", ["is not YAML"]),
        ("a: " * 30_000, ["is not YAML"]),
        (NESTED, [":1: lists and sections lie more than 20 deep"]),
        ("seed: " + NESTED, [":1: lists and sections lie more than 20 deep"]),
        ("{a: " * 30_000, [":1: lists and sections lie more than 20 deep"]),
        ("- " * 30_000, ["lists and sections lie more than 20 deep"]),
        ("focus: {layers: [" + "0, " * 20_000 + "]}", ["focus.layers: more than 1000 values"]),
        ("#" * (2**20 + 1), ["is longer than 1048576 bytes"]),
    ],
)  # fmt: skip
def test_files_that_are_no_settings(content, parts, file, tmp_path):
    """From the command line, and as the config.yaml of a run that another command is about."""
    path = file(content)
    started = time.perf_counter()
    refused(["train", "--config", path], path, *parts)
    run = tmp_path / "run"
    run.mkdir()
    path.rename(run / "config.yaml")
    with pytest.raises(ValueError, match="^config: .*config.yaml does not hold the settings of a training run: ") as caught:
        read_run_config("config", run)
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)
    assert time.perf_counter() - started < 60


def test_long_values_are_shortened():
    message = refused(
        ["train", *REQUIRED["train"], "--focus.layers", *["0"] * 900], "focus.layers: got [0, 0, 0", "…; expected"
    )
    assert len(message) < 600


def test_billion_laughs(file):
    lines = ["optim: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(12)]
    refused(["train", "--config", file("\n".join(lines))], "optim: got a list; expected a section")
    bomb = "focus: {layers: &a [0, 0]}\n" + "loss: {times: [" + "*a, " * 9 + "]}\n"
    refused(["train", "--config", file(bomb)], "loss.times: got a list; expected a finite number")


def test_aliases_and_a_byte_order_mark_are_taken(file):
    path = file(b"\xef\xbb\xbfdata: {train: &x a, validation: *x, buckets: &y [4:3, '1:1'], reference_buckets: *y}\n")
    data = read_settings(path, TrainConfig)["data"]
    assert data == {"train": "a", "validation": "a", "buckets": ["4:3", "1:1"], "reference_buckets": ["4:3", "1:1"]}


@pytest.mark.parametrize(
    "option", ["focus.layers", "data.buckets", "optim", "run_name", "focus.tau", "trackers+", "seed", "cpu"]
)
@pytest.mark.parametrize(
    "text", [NESTED, "{" * 30_000, "- " * 30_000, "&a [*a]", "!!python/object:x y", "\x1b[2J\n", "a: b: c"]
)
def test_values_on_the_command_line(option, text):
    arguments = ["train", *REQUIRED["train"], f"--{option}", text]
    started = time.perf_counter()
    if option == "run_name":
        assert cli.parse_config(arguments)[1].run_name == text, "any text is a name"
    elif option == "data.buckets" and "[" not in text[:1]:
        refused(arguments, "data.buckets: got ")
    else:
        refused(arguments, f"{option.removesuffix('+')}: ")
    assert time.perf_counter() - started < 60


def test_positional_arguments_are_texts():
    for text in ("null", "[1", "{a: 1}", "5", "true", NESTED[:3000]):
        assert cli.parse_config(["report", text])[1].run_dir == text


def test_what_is_meant_without_quotes(file):
    path = file(
        yaml.safe_dump(MINIMAL)
        + "mixed_precision: no\ncpu: yes\ndeterministic: off\nrun_name: 1e5\nproject: on\nseed: 010\nmax_steps: 1_000\n"
        + "focus: {match_count: 0.5, entropy_sigma: 1e-2}\noptim: {lr: 1}\n"
    )
    _, config = cli.parse_config(["train", "--config", str(path)])
    assert (config.mixed_precision, config.cpu, config.deterministic) == ("no", True, False)
    assert (config.run_name, config.project, config.seed, config.max_steps) == ("1e5", "on", 10, 1000)
    assert (config.focus.match_count, config.focus.entropy_sigma, config.optim.lr) == (0.5, 0.01, 1.0)
    assert type(config.optim.lr) is float
    _, config = cli.parse_config(["train", "--config", str(path), "--mixed_precision", "bf16", "--cpu=no", "--run_name", "no"])
    assert (config.mixed_precision, config.cpu, config.run_name) == ("bf16", False, "no")


def test_a_section_on_the_command_line(file):
    path = file("lr: 0.5\n")
    base = ["train", *REQUIRED["train"]]
    for text in (str(path), "{lr: 0.5}"):
        assert cli.parse_config([*base, "--optim", text, "--optim.eps", "1"])[1].optim.lr == 0.5
    assert cli.parse_config([*base, "--trackers+", "wandb"])[1].trackers == ["tensorboard", "wandb"]
    refused([*base, "--optim", "{lr: null}"], "optim.lr: got null")
    refused([*base, "--optim", file("lr: null\n")], f"{path}:1: optim.lr: got null")
    assert cli.parse_config(["stress", "--model", "{path: x}"])[1].model.path == "x"
    refused(["stress", "--model.path", "null"], "model.path: got null; expected a text")


@pytest.mark.parametrize("place", [".", "absent.yaml", "x" * 5000, "loop.yaml"])
def test_files_that_cannot_be_read(place, tmp_path):
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    refused(["train", "--config", tmp_path / place], f"focusdpo train: error: {tmp_path / place}: cannot be read (")
    with pytest.raises((ValueError, OSError)) as caught:
        read_run_config("config", tmp_path / place)
    assert str(caught.value).startswith("config: ")


def test_runs_settings_are_read_back_as_they_are_written(tmp_path):
    """What a run writes, by YAML 1.1, is what it reads: texts that look like other things as well."""
    _, config = cli.parse_config(["train", *REQUIRED["train"], "--optim.lr", "1e-5", "--data.buckets", "4:3"])
    for text in (
        "no",
        "null",
        "~",
        "1e5",
        "4:3",
        "0x1f",
        "2024-01-01",
        ".inf",
        "a: b",
        "[",
        "*x",
        "&x",
        "!x",
        " x ",
        "",
        "é\n\u2028",
    ):
        config.run_name = text
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
        assert read_run_config("config", file) == config


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {path: x}\n")
    with pytest.raises(ValueError, match="does not hold .*: data: is missing; expected a section with train"):
        read_run_config("config", tmp_path)
    (tmp_path / "config.yaml").write_text("model: {path: x}\ndata: {}\n")
    with pytest.raises(ValueError, match=r"does not hold .*: data\.train: is missing; expected a text"):
        read_run_config("config", tmp_path)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["no", "yes", "null", "all", "focus", "1e5", "4:3", "inf"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(["lr", "path"]), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.sampled_from(EVERY), value=VALUES, flow=st.booleans())
def test_any_value_for_any_setting_fits_its_type_or_is_refused_by_name(which, value, flow, tmp_path):
    command, name, kind = which
    file = tmp_path / "any.yaml"
    file.write_text(yaml.safe_dump(nested(name, value), default_flow_style=flow, allow_unicode=True), "utf-8")
    try:
        found = read_settings(file, cli.COMMANDS[command].config_class)
    except SettingError as error:
        assert name in str(error) and not UNSEEN.search(str(error)), error  # noqa: PT017
        assert not (fits(value, kind) and not isinstance(value, int | dict | list | str)), f"{value!r} would have done"
        return
    for part in name.split("."):
        found = found[part]
    assert fits(found, kind)
    if isinstance(value, str) and str in members(kind):
        assert found == value, "a text stays as it is"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.text("{}[]:,-?*&!|>'\"#%@` \n\tabnoseed01.~", max_size=60).map(str.encode))
def test_any_bytes_are_settings_or_refused_in_one_line(content, tmp_path):
    file = tmp_path / "bytes.yaml"
    file.write_bytes(content)
    try:
        assert isinstance(read_settings(file, TrainConfig), dict)
    except SettingError as error:
        assert str(error).startswith(str(file)) and not UNSEEN.search(str(error))  # noqa: PT017


@settings(max_examples=200, deadline=None)
@given(
    which=st.sampled_from(EVERY), texts=st.lists(st.text(max_size=30) | st.sampled_from(BAD_NUMBERS), min_size=1, max_size=3)
)
def test_any_words_after_any_option_fit_its_type_or_are_refused_by_name(which, texts):
    _, name, kind = which
    try:
        assert fits(read_option(name, texts, kind), kind)
    except SettingError as error:
        assert str(error).startswith(name) and not UNSEEN.search(str(error))  # noqa: PT017


def test_each_command_reads_a_file_with_all_its_defaults(file):
    """Nothing that a configuration has by default is refused where it is written out."""
    for command in cli.COMMANDS.values():
        defaults = {}
        for field in dataclasses.fields(command.config_class):
            if field.default is not dataclasses.MISSING:
                defaults[field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                value = field.default_factory()
                defaults[field.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        assert read_settings(file(yaml.safe_dump(defaults)), command.config_class) == defaults
