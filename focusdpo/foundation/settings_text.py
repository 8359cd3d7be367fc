"""Settings as text: YAML files and the values of options, read by the types of the configuration that they fill.

A type decides what its text means: `no` is a choice's name where choices have one of that name, and False where a truth value
is expected; 4:3 is an aspect ratio, not YAML 1.1's number 243. What a type does not take is refused by the setting's name: null
where it is not optional, numbers that are not finite, names that are no settings or stand twice, tags, and more nesting or
more values than any configuration has.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from focusdpo.foundation.text import printable

MAX_BYTES = 2**20  # of a file
MAX_DEPTH = 20  # of lists and sections within another
MAX_VALUES = 1000  # aliases counted as often as they are used
MAX_WHOLE = 2**32  # no count or seed has a use for more
SHOWN = 80  # characters of what came, in a message

NULL = {"", "~", "null", "Null", "NULL"}
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
LONGEST_NUMBER = 40  # characters
WHOLE = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*")
BASED = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+")
NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:_[0-9]+)*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")

Part = Literal["scalar", "list", "section"]


class SettingError(ValueError):
    """A setting that cannot be taken; the message begins with where it stands and its name."""


@dataclass
class Node:
    """A value as it stands in YAML: a scalar's text, a list's items, or a section's keys and values."""

    part: Part
    line: int
    text: str = ""
    plain: bool = True  # a scalar without quotes
    items: Sequence[Node] = ()
    entries: Sequence[tuple[Node, Node]] = ()

    def __str__(self) -> str:
        if self.part != "scalar":
            return "a list" if self.part == "list" else "a section"
        text = ("null" if self.text in NULL else self.text) if self.plain else repr(self.text)
        return printable(text if len(text) <= SHOWN else f"{text[:SHOWN]}…")


def types_of(config: Any) -> dict[str, Any]:
    """Types of a configuration's settings, by name; `config` is its class."""
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in fields(config) if field.init}


@cache
def alternatives(kind: Any) -> tuple[Any, ...]:
    """The types of a union; the type itself where it is none."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def section_of(kind: Any) -> type[Any] | None:
    """The configuration that a type takes, where it takes one."""
    return next((one for one in alternatives(kind) if isinstance(one, type) and is_dataclass(one)), None)


def item_of(kind: Any) -> Any:
    """The type of the items, where a type takes a list."""
    return next((typing.get_args(one)[0] for one in alternatives(kind) if typing.get_origin(one) is list), None)


def options(config: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings by dotted names, sections as well, with their types."""
    for name, kind in types_of(config).items():
        yield f"{prefix}{name}", kind
        section = section_of(kind)
        if section is not None:
            yield from options(section, f"{prefix}{name}.")


def expected(kind: Any) -> str:
    """What a type takes, in words."""
    texts: list[str] = []
    for one in alternatives(kind):
        if typing.get_origin(one) is Literal:
            texts += map(repr, typing.get_args(one))
        elif typing.get_origin(one) is list:
            texts.append(f"a list, each {expected(item_of(one))}")
        elif is_dataclass(one):
            texts.append(f"a section with {', '.join(types_of(one))}")
        elif one is int:
            texts.append("a whole number up to 2^32")
        else:
            texts.append({str: "a text", float: "a finite number", bool: "true or false", types.NoneType: "null"}[one])
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def read_settings(file: str | Path, config: type[Any], prefix: str = "") -> dict[str, Any]:
    """A YAML file's settings, those that it names, sections as dictionaries.

    Raises:
        SettingError: with the file, and where it can be read the line and the setting.
    """
    reader = Reader(printable(file))
    try:
        with Path(file).open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            reader.fail(None, f"is longer than {MAX_BYTES} bytes, which no settings are")
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise SettingError(f"{reader.where}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SettingError(f"{reader.where}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    node = reader.parse(text)
    if node.part != "section":
        reader.refuse(node, "", "nothing" if str(node) == "null" else str(node), "settings, each as NAME: VALUE")
    return typing.cast(dict[str, Any], reader.value(node, config, prefix))


def read_option(name: str, texts: Sequence[str], kind: Any) -> Any:
    """The value of an option, of the texts that follow it; SettingError where it has none."""
    reader, item, section = Reader(), item_of(kind), section_of(kind)
    nested = texts[0].lstrip()[:1] in ({"["} if item is not None else {"{"} if section is not None else set())
    if item is not None and (len(texts) > 1 or (alternatives(kind) == (kind,) and not nested)):
        return [reader.value(_bare(text), item, name) for text in texts]
    text = " ".join(texts)
    if section is not None and os.path.isfile(text):  # Path's own raises where a name is too long
        return read_settings(text, section, f"{name}.")
    try:
        return reader.value(reader.parse(text, name) if nested else _bare(text), kind, name)
    except SettingError as error:  # one value for a list that has an alternative
        if item is None or nested or text in NULL:
            raise
        try:
            return [reader.value(_bare(text), item, name)]
        except SettingError:
            raise error from None


def _bare(text: str) -> Node:
    """An option's text: nothing but null is null there, an empty text and a home's ~ are texts."""
    return Node("scalar", 0, text, plain=text not in NULL or text == "null")


def build(config: type[Any], values: dict[str, Any], prefix: str = "") -> Any:
    """A configuration of the settings that were read, and of defaults; SettingError where one without a default is missing."""
    given: dict[str, Any] = {}
    for field in fields(config):
        name, kind = f"{prefix}{field.name}", types_of(config).get(field.name)
        section = section_of(kind)
        if field.name in values:
            value = values[field.name]
            given[field.name] = build(section, value, f"{name}.") if section and isinstance(value, dict) else value
        elif field.init and field.default is MISSING and field.default_factory is MISSING:
            raise SettingError(f"{name}: is missing; expected {expected(kind)}")
    return config(**given)


@dataclass
class Reader:
    """Reads nodes, and says where what cannot be read stands.

    Args:
        where: the file; none of an option.
    """

    where: str = ""
    values: int = 0

    def refuse(self, node: Node | None, name: str, got: str, wanted: str) -> NoReturn:
        self.fail(node, f"{name}{': ' * bool(name)}got {got}; expected {wanted}")

    def fail(self, node: Node | None, message: str) -> NoReturn:
        line = f":{node.line}" if node is not None and node.line else ""
        raise SettingError(f"{self.where}{line}: {message}" if self.where else message)

    def parse(self, text: str, name: str = "") -> Node:
        """The root of YAML. Events come one by one, so that nothing is ever built of what goes too deep."""
        about = f"{name}: " if name else ""
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        anchors: dict[str, Node] = {}
        open_nodes: list[tuple[Node, str | None, list[Node]]] = []
        roots: list[Node] = []
        try:
            for event in yaml.parse(text, Loader=loader):
                line = event.start_mark.line + 1 if event.start_mark is not None else 0
                here, tag, anchor = Node("scalar", line), getattr(event, "tag", None), getattr(event, "anchor", None)
                if tag:
                    self.fail(here, f"{about}has the tag {printable(tag)}; expected values without tags")
                node: Node | None = None
                if isinstance(event, yaml.AliasEvent):
                    if anchor not in anchors:
                        self.fail(here, f"{about}*{printable(anchor)} stands for nothing before it")
                    node = anchors[anchor]
                elif isinstance(event, yaml.ScalarEvent):
                    node = Node("scalar", line, event.value, plain=not event.style)
                elif isinstance(event, yaml.CollectionStartEvent):
                    if len(open_nodes) >= MAX_DEPTH:
                        self.fail(here, f"{about}lists and sections lie more than {MAX_DEPTH} deep; no settings do")
                    kind: Part = "list" if isinstance(event, yaml.SequenceStartEvent) else "section"
                    open_nodes.append((Node(kind, line), anchor, []))
                elif isinstance(event, yaml.CollectionEndEvent):
                    node, anchor, items = open_nodes.pop()
                    if node.part == "list":
                        node.items = items
                    else:
                        node.entries = list(zip(items[::2], items[1::2], strict=True))
                if node is not None:
                    if anchor:
                        anchors[anchor] = node
                    (open_nodes[-1][2] if open_nodes else roots).append(node)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            node = Node("scalar", mark.line + 1) if mark is not None else None
            problem = " ".join(filter(None, (error.context, error.problem)))
            self.fail(node, f"{about}is not YAML ({printable(problem)})")
        except yaml.YAMLError as error:  # characters that YAML has no place for
            self.fail(None, f"{about}is not YAML ({printable(str(error).splitlines()[0])})")
        if len(roots) > 1:
            self.fail(roots[1], f"{about}holds several documents; expected one")
        return roots[0] if roots else Node("scalar", 1)

    def value(self, node: Node, kind: Any, name: str) -> Any:
        """What a node means to a type."""
        self.values += 1
        if self.values > MAX_VALUES:
            self.fail(node, f"{name}: more than {MAX_VALUES} values; no settings have as many")
        section, item = section_of(kind), item_of(kind)
        if node.part == "section" and section is not None:
            return self._section(node, section, f"{name}." if name and not name.endswith(".") else name)
        if node.part == "list" and item is not None:
            return [self.value(one, item, name) for one in node.items]
        is_null = node.part == "scalar" and node.plain and node.text in NULL
        if is_null and types.NoneType in alternatives(kind):
            return None
        if node.part == "scalar" and not is_null:
            for meaning in _meanings(node, alternatives(kind)):
                return meaning
        hint = "; in quotes it is a text" if is_null and self.where and str in alternatives(kind) else ""
        self.refuse(node, name, str(node), expected(kind) + hint)

    def _section(self, node: Node, config: type[Any], prefix: str) -> dict[str, Any]:
        known, found = types_of(config), dict[str, Any]()
        for key, value in node.entries:
            name = f"{prefix}{printable(key.text[:SHOWN]) if key.part == 'scalar' else key}"
            if key.part != "scalar" or key.text not in known:
                near = difflib.get_close_matches(key.text, known, n=1)
                hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}"
                self.fail(key, f"{name}: is no setting; {hint}")
            if key.text in found:
                self.fail(key, f"{name}: stands twice; keep one of them")
            found[key.text] = self.value(value, known[key.text], name)
        return found


def _meanings(node: Node, kinds: Sequence[Any]) -> Iterator[Any]:
    """What a scalar may mean, the closest first: a choice, a number or truth value, a text; in quotes a text comes first."""
    text = node.text.strip() if len(node.text) <= LONGEST_NUMBER else ""
    choices = [choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]
    yield from (choice for choice in choices if isinstance(choice, str) and choice == node.text)
    if str in kinds and not node.plain:
        yield node.text
    whole = _whole(text)
    if whole is not None and abs(whole) <= MAX_WHOLE:
        yield from (choice for choice in choices if type(choice) is int and choice == whole)
        if int in kinds:
            yield whole
    if float in kinds:
        number = float(whole) if whole is not None else float(text) if NUMBER.fullmatch(text) else math.nan
        if math.isfinite(number) and not (int in kinds and whole is not None):
            yield number
    if bool in kinds and text.lower() in TRUTH:
        yield TRUTH[text.lower()]
    if str in kinds:
        yield node.text


def _whole(text: str) -> int | None:
    return int(text, 0) if BASED.fullmatch(text) else int(text) if WHOLE.fullmatch(text) else None
