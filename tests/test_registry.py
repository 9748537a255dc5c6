"""The registry: methods are known from their source alone, and what is wrong with a declaration is one clear error."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from espalier import registry
from espalier.errors import EspalierError
from espalier.verbs.methods import methods as methods_verb

SOURCE = Path(registry.__file__).parent
ADAPTER = '''
from espalier.attach.method import Adapter
from espalier.registry import adapter


@adapter("{name}", ids=(7, 8), paper="a paper")
class Made(Adapter):
    """Does nothing.

    At length.
    """

    zeal: float = {default}
    """how much
    of it"""
    mode: Literal["a", "b"] = "a"
    """which"""
    counted: ClassVar[int] = 3
'''


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plugins that are added in a test are gone after it."""
    monkeypatch.setattr(registry, "_plugins", [])
    yield
    registry.methods.cache_clear()


def plugin(folder: Path, stem: str, name: str = "made", default: str = "0.5") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{stem}.py"
    file.write_text(ADAPTER.format(name=name, default=default))
    return file


def decorated() -> dict[str, Path]:
    """Name to file of every decorated method, found by looking for decorators at the beginning of lines."""
    found = {}
    for file in SOURCE.glob("*/*.py"):
        for _, name in re.findall(r"^@(adapter|brancher|optimizer|compressor|merger|searcher)\(\s*\"([\w-]+)\"", file.read_text(), re.MULTILINE):
            found[name] = file
    return found


def test_every_decorated_method_is_found_where_it_is() -> None:
    known = {info.name: info for info in registry.methods()}
    assert known.keys() == decorated().keys() >= {"lora", "dora", "mos", "paca", "full", "adamw", "muon"}
    for name, file in decorated().items():
        assert SOURCE.parent / known[name].file == file and known[name].kind == file.parent.name
        assert known[name].lines == len(file.read_text().splitlines())
    kinds = [registry.ROOMS.index(info.kind) for info in registry.methods()]
    assert kinds == sorted(kinds)


def test_no_method_is_run_to_be_found() -> None:
    check = (
        "import sys\nfrom espalier import registry\nassert len(registry.methods()) >= 7 and registry.find('lora', 'adapter').paper\n"
        "rooms = tuple(f'espalier.{room}.' for room in registry.ROOMS)\n"
        "assert not [name for name in sys.modules if name == 'torch' or name.startswith(rooms)]\n"
        "registry.make('lora', 'adapter')\nassert 'torch' in sys.modules and 'espalier.adapt.lora' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("name", sorted(decorated()))
def test_what_is_read_is_what_runs(name: str) -> None:
    """Options, defaults, papers and settings read from the source are those of the class."""
    info = registry.find(name)
    method = registry.load(info)
    assert (method.name, method.role, method.ids, method.paper) == (name, info.role, info.ids, info.paper)
    if isinstance(method, type):
        # one that needs an option cannot be made without it
        made = method() if "needs" in info.settings else registry.make(name, info.role)
        fields = [(f.name, f.default) for f in dataclasses.fields(method)]
    else:
        made, fields = method, [(p.name, p.default) for p in inspect.signature(method).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert [(h.name, h.default) for h in info.hyperparameters] == fields
    assert all(getattr(made, key) == value for key, value in info.settings.items())
    assert info.summary and method.__doc__.startswith(info.summary[:20])
    assert all(h.help for h in info.hyperparameters)


def test_the_public_record_is_what_json_shows() -> None:
    command = [sys.executable, "-m", "espalier", "methods", "--json"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert listed == json.loads(json.dumps(methods_verb())) and len(listed) == len(registry.methods())
    for method in listed:
        assert set(method) == {"name", "kind", "ids", "paper", "file", "lines", "summary", "hyperparameters"}
        assert all(isinstance(method[key], str) for key in ("name", "kind", "paper", "file", "summary"))
        assert isinstance(method["ids"], list) and method["lines"] > 10
        for option in method["hyperparameters"]:
            assert set(option) == {"name", "type", "default", "help"}
    lora = next(method for method in listed if method["name"] == "lora")
    assert lora["hyperparameters"][0] == {"name": "rank", "type": "int", "default": 16, "help": "rank r of the update, at least 1"}
    assert {m["name"] for m in methods_verb(kind="optim")} == {m["name"] for m in listed if m["kind"] == "optim"}


# plugins


def test_a_plugin_is_read_and_runs(plugins: None, tmp_path: Path) -> None:
    registry.add_plugin(plugin(tmp_path, "read_and_run"))
    info = registry.find("made", "adapter")
    assert (info.kind, info.role, info.ids, info.paper, info.summary) == ("adapt", "adapter", (7, 8), "a paper", "Does nothing.")
    assert info.file == str(tmp_path / "read_and_run.py")
    assert [dataclasses.astuple(h) for h in info.hyperparameters] == [
        ("zeal", "float", 0.5, "how much of it"),
        ("mode", "Literal['a', 'b']", "a", "which"),
    ]
    assert "espalier_plugin_0_read_and_run" not in sys.modules


def test_a_plugin_that_is_made_has_the_given_options(plugins: None, tmp_path: Path) -> None:
    file = plugin(tmp_path / "select", "given_options")
    file.write_text("from typing import ClassVar, Literal\n" + file.read_text())
    registry.add_plugin(file)
    made = registry.make("made", "adapter", zeal="0.25", mode="b")
    assert (made.zeal, made.mode, made.counted) == (0.25, "b", 3)
    assert registry.find("made").kind == "select", "the folder says the kind"


def test_options_of_bases_that_are_dataclasses_are_options_too(plugins: None, tmp_path: Path) -> None:
    """In the order and with the defaults that a dataclass gives them, and as far as the package's files are."""
    file = tmp_path / "inherits.py"
    file.write_text(
        "from dataclasses import dataclass\n\nfrom espalier.adapt.lora import LoRA as Plain\nfrom espalier.registry import adapter\n\n\n"
        '@dataclass\nclass Base(Plain):\n    zeal: float = 0.5\n    """how much"""\n\n\n'
        'class Between(Base):\n    hidden: int = 3\n\n\n'
        '@adapter("made", ids=(), paper="")\nclass Made(Between):\n    """A method."""\n\n    rank: int = 2\n    """another rank"""\n'
    )
    registry.add_plugin(file)
    found = {h.name: h for h in registry.find("made").hyperparameters}
    made = registry.make("made", "adapter", zeal=0.25)
    assert [(name, h.default) for name, h in found.items()] == [(f.name, f.default) for f in dataclasses.fields(made)]
    assert list(found)[:2] == ["rank", "alpha"] and list(found)[-1] == "zeal" and "hidden" not in found
    assert (found["rank"].default, found["rank"].help, made.zeal) == (2, "another rank", 0.25)


def test_two_plugins_of_one_file_name_are_two_methods(plugins: None, tmp_path: Path) -> None:
    for name in ("one", "two"):
        file = plugin(tmp_path / name, "same_stem", name)
        file.write_text("from typing import ClassVar, Literal\n" + file.read_text())
        registry.add_plugin(file)
        registry.add_plugin(file)  # twice is once
    assert [type(registry.make(name, "adapter")).name for name in ("one", "two")] == ["one", "two"]


def test_two_methods_of_one_name_are_refused(plugins: None, tmp_path: Path) -> None:
    registry.add_plugin(plugin(tmp_path, "second", "lora"))
    with pytest.raises(EspalierError, match=r"two methods are called 'lora': espalier/adapt/lora\.py and .*second\.py"):
        registry.methods()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"does not exist; give a Python file"),
        (b"def nothing(): ...\n", r"declares no method \(a class or function under @adapter or @brancher or @optimizer or @compressor or @merger or @searcher\)"),
        (b"# mentions @adapter( only\n", "declares no method"),
        (b'@adapter("x", ids=(), paper="")\nclass X(:\n', r"p\.py is not Python"),
        (b"@adapter(\xff\n", r"p\.py is not Python"),
        (b'@adapter("x", ids=(), paper="")\nclass X:\n    a: int = 2 * 8\n', r"p\.py:2: the declaration of X is not literal"),
        (b'@adapter(NAME, ids=(), paper="")\nclass X: ...\n', r"p\.py:2: the declaration of X is not literal"),
        (b'@adapter("x", ids=tuple(), paper="")\nclass X: ...\n', "is not literal"),
        (b"@adapter()\nclass X: ...\n", "is not literal"),
    ],
)
def test_a_file_that_is_no_plugin_is_refused(content: bytes | None, complaint: str, plugins: None, tmp_path: Path) -> None:
    file = tmp_path / "p.py"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(EspalierError, match=complaint):
        registry.add_plugin(file)
    assert not registry._plugins


# options


def test_an_unknown_method_is_refused_with_those_of_its_role() -> None:
    with pytest.raises(EspalierError, match=r"no adapter is called 'lorra'; did you mean 'lora'\? \(there are: .*\bdora, .*\blora, .*\bmos, .*\)") as refusal:
        registry.find("lorra", "adapter")
    assert "adamw" not in str(refusal.value)
    with pytest.raises(EspalierError, match="no adapter is called 'adamw'"):
        registry.find("adamw", "adapter")
    assert registry.find("adamw").role == "optimizer"


def test_an_option_of_another_method_names_its_owners() -> None:
    with pytest.raises(EspalierError, match=r"alpha is no option of paca \(it belongs to .*\bdora, .*\blora, .*\bmos, .*\); paca has: rank"):
        registry.make("paca", "adapter", alpha=3)
    with pytest.raises(EspalierError, match=r"momentum is no option of adamw \(it belongs to muon\)"):
        registry.make("adamw", "optimizer", momentum=0.5)
    with pytest.raises(EspalierError, match=r"rankk is no option of lora; did you mean 'rank'\?; lora has: rank, alpha, scaling"):
        registry.make("lora", "adapter", rankk=3)
    with pytest.raises(EspalierError, match=r"rank is no option of full .*; full has: none"):
        registry.make("full", "adapter", rank=3)


@pytest.mark.parametrize(
    ("annotation", "value", "right"),
    [
        (int, "16", 16),
        (float, "1e-3", 1e-3),
        (float, 2, 2.0),
        (bool, "false", False),
        (Literal["a", "b"], "b", "b"),
        (list[int], "1, 2,3", [1, 2, 3]),
        (list[str] | None, "a", ["a"]),
        (int | None, None, None),
    ],
)
def test_a_string_becomes_what_the_annotation_says(annotation: Any, value: Any, right: Any) -> None:
    found = registry.coerce("--option", annotation, value)
    assert found == right and type(found) is type(right)


@pytest.mark.parametrize(
    ("annotation", "value", "complaint"),
    [
        (int, "many", r"--option is 'many': .*valid integer"),
        (int, "1.5", r"--option is '1.5': .*valid integer"),
        (int, 1.5, r"--option is 1.5: .*valid integer"),
        (float, "fast", r"--option is 'fast': .*valid number"),
        (bool, "perhaps", r"--option is 'perhaps': .*valid boolean"),
        (Literal["a", "b"], "c", r"--option is 'c': .*'a' or 'b'"),
        (list[int], "1,x", r"--option is \['1', 'x'\]: .*valid integer"),
    ],
)
def test_a_value_of_another_type_is_refused(annotation: Any, value: Any, complaint: str) -> None:
    with pytest.raises(EspalierError, match=complaint) as refusal:
        registry.coerce("--option", annotation, value)
    assert "\n" not in str(refusal.value)
