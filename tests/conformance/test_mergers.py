"""What every merge method must do, through the engine that writes models: no line here knows a method.

The methods come from the registry. The tables say which options a method cannot do without, with which it leaves nothing
out, and which of the shared properties it does not promise. What is special to a method is tested in ``tests/methods``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from mergers import merge_on_disk, random, save

from espalier import registry
from espalier.anatomy.parameters import parameters
from espalier.calibrate import store as calibrations
from espalier.checkpoint.directory import ModelDirectory
from espalier.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from espalier.delta import merging, store
from espalier.delta.forms import Columns, Dense, LowRank, Replace, Rows, Sparse, Update
from espalier.errors import EspalierError
from espalier.exchange.merging import Model
from espalier.verbs.apply import apply
from espalier.verbs.merge import merge

METHODS = [info.name for info in registry.methods() if info.role == "merger"]
every_method = pytest.mark.parametrize("method", METHODS)
pytestmark = [pytest.mark.room("merge")]

COUNT = {"slerp": 2, "nearswap": 1, "passthrough": 1, "wise_ft": 1}
"""How many models a method takes, where it does not take any number."""
REQUIRED: dict[str, dict[str, Any]] = {"metrics_weighted": {"metrics": [1.0, 2.0, 4.0]}}
"""Options that a method cannot do without."""
NEEDS_FILES = ("fisher", "regmean")
"""Methods whose options name files about the models; the fixture makes them."""
COMPLETE: dict[str, dict[str, Any]] = {
    "breadcrumbs": {"density": 1.0, "gamma": 0.0, "normalize": True},
    "dare": {"density": 1.0, "normalize": True},
    "della": {"density": 1.0},
    "task_arithmetic": {"normalize": True},
    "nearswap": {"t": 100.0},
    "ties": {"density": 1.0},
    "wise_ft": {"alpha": 1.0},
}
"""Options with which a method leaves nothing out."""
NOT_THE_COMMON_MODEL = ("pcb", "opcm")
"""Copies of one model do not give it: these drop low scores, or rescale all tensors together."""
ORDERED = ("slerp", "dare", "della", "opcm")
"""The order of the models matters: from the first to the second, which mask is whose, what comes first."""

SHAPES: dict[str, tuple[int, ...]] = {
    "matrix": (96, 40),
    "tall": (150, 8),
    "experts": (3, 24, 20),
    "convolution": (12, 6, 3, 3),
    "vector": (64,),
    "tiny": (3,),
    "number": (1,),
    "scalar": (),
    "unchanged": (16, 8),
}
Tensors = dict[str, torch.Tensor]


def base_tensors(dtype: torch.dtype = torch.float32) -> Tensors:
    return {name: random(number, *shape).to(dtype) for number, (name, shape) in enumerate(SHAPES.items())}


def changed(base: Tensors, seed: int) -> Tensors:
    """Fine-tuned: everything a little, a third not at all, one tensor nowhere."""
    made = {}
    for number, (name, tensor) in enumerate(base.items()):
        change = 0.1 * random(100 * seed + number, *tensor.shape)
        change = torch.where(random(100 * seed + number + 50, *tensor.shape) > -0.4, change, 0.0)
        made[name] = tensor if name == "unchanged" else (tensor.float() + change).to(tensor.dtype)
    return made


class World:
    """A base and three models of it on disk."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.tensors = folder, base_tensors(dtype)
        self.tuned = [changed(self.tensors, seed) for seed in (1, 2, 3)]
        self.base = save(folder / "base", self.tensors)
        self.models = [save(folder / str(number), tensors) for number, tensors in enumerate(self.tuned)]
        self._made = 0

    def options(self, method: str, complete: bool = False) -> dict[str, Any]:
        options = {**REQUIRED.get(method, {}), **(COMPLETE.get(method, {}) if complete else {})}
        if method in NEEDS_FILES:
            options["statistics"] = [str(self.statistics(number)) for number in range(3)]
        return options

    def statistics(self, number: int) -> Path:
        """Calibrations with a Fisher diagonal of every tensor and second moments of the matrices."""
        path = self.folder / f"{number}.calibration"
        if not path.exists():
            write_statistics(path, self.tensors, number)
        return path

    def merge(self, method: str, models: list[Model] | None = None, **keywords: Any) -> Tensors:
        models = self.models[: COUNT.get(method, 3)] if models is None else models
        self._made += 1
        keywords = {**self.options(method), **keywords}
        return merge_on_disk(method, keywords.pop("base", self.base), models, self.folder / f"out {self._made}", **keywords)


def write_statistics(path: Path, tensors: Tensors, seed: int) -> None:
    matrices = {name: list(tensor.shape[-1:]) for name, tensor in tensors.items() if tensor.ndim == 2}
    facts = {
        "format": 1,
        "request": {"want": ["second_moment", "fisher"], "rank": 1},
        "sequences": 4,
        "places": {"input": {f"{name} input": shape for name, shape in matrices.items()}, "gradient": {n: list(t.shape) for n, t in tensors.items()}},
        "sites": {name: f"{name} input" for name in matrices},
        "coverage": {f"{name} input": [50] for name in matrices},
    }
    made = {}
    for number, (name, shape) in enumerate(calibrations.expected(facts).items()):
        drawn = random(1000 * seed + number, *shape).double()
        made[name] = drawn @ drawn.mT if name.endswith("second_moment") else drawn.square()
    raw = path.with_suffix(".raw")
    write_safetensors(raw, made)
    calibrations.write(path, facts, dict.fromkeys(made, SafetensorsFile(raw)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def assert_same_bits(first: Tensors, second: Tensors) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@every_method
def test_shapes_and_dtypes_are_kept_and_what_nobody_changed_is_the_base(method: str, world: World) -> None:
    made = world.merge(method)
    for name, tensor in world.tensors.items():
        assert made[name].shape == tensor.shape and made[name].dtype == tensor.dtype
        assert bool(made[name].isfinite().all())
    torch.testing.assert_close(made["unchanged"], world.tensors["unchanged"], rtol=1e-6, atol=1e-6)


@every_method
def test_copies_of_one_model_give_it(method: str, world: World) -> None:
    if method in NOT_THE_COMMON_MODEL:
        pytest.skip("not promised by this method")
    made = world.merge(method, [world.models[0]] * COUNT.get(method, 3), **world.options(method, complete=True))
    for name, tensor in world.tuned[0].items():
        torch.testing.assert_close(made[name], tensor, rtol=2e-6, atol=2e-6, msg=lambda message, name=name: f"{name}: {message}")


@every_method
def test_a_scale_of_zero_gives_the_base(method: str, world: World) -> None:
    made = world.merge(method, scale=0.0)
    expected = {n: torch.zeros_like(t) for n, t in world.tensors.items()} if method == "passthrough" else world.tensors
    for name, tensor in expected.items():
        torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-6)


@every_method
def test_the_order_of_the_models_does_not_matter(method: str, world: World) -> None:
    if method in ORDERED or COUNT.get(method, 3) == 1:
        pytest.skip("the order is part of this method, or there is one model")
    options, order = world.options(method), [2, 0, 1]
    others = {key: [value[i] for i in order] if isinstance(value, list) and len(value) == 3 else value for key, value in options.items()}
    weights = [0.5, 1.0, 1.5]
    first = world.merge(method, weights=weights)
    second = world.merge(method, [world.models[i] for i in order], weights=[weights[i] for i in order], **others)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-5)


@every_method
def test_slices_do_not_matter(method: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {}
    for piece, sample in ((1 << 20, 1 << 15), (8, 1 << 15), (60, 64)):
        monkeypatch.setattr(merging, "PIECE", piece)
        monkeypatch.setattr(merging, "SAMPLE", sample)
        made[piece] = world.merge(method)
    for name, tensor in made[1 << 20].items():
        # sums over a tensor are rounded where slices end; nothing else may differ
        torch.testing.assert_close(made[8][name], tensor, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(made[60][name], tensor, rtol=1e-6, atol=1e-6)


@every_method
def test_the_same_seed_gives_the_same_bytes_whatever_the_threads(method: str, world: World) -> None:
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            made.append(world.merge(method, seed=7))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(*made)


@every_method
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives(method: str, world: World) -> None:
    for name, tensor in world.merge(method, device="cuda").items():
        torch.testing.assert_close(tensor, world.merge(method)[name], rtol=1e-5, atol=1e-6)


@every_method
def test_bf16_models_give_what_float32_ones_give_rounded_once(method: str, tmp_path: Path) -> None:
    world = World(tmp_path / "bf16", torch.bfloat16)
    wide = World.__new__(World)
    wide.folder, wide._made, wide.tensors = tmp_path / "fp32", 0, {n: t.float() for n, t in world.tensors.items()}
    wide.base = save(wide.folder / "base", wide.tensors)
    wide.models = [save(wide.folder / str(i), {n: t.float() for n, t in tuned.items()}) for i, tuned in enumerate(world.tuned)]
    made, expected = world.merge(method), wide.merge(method)
    for name, tensor in made.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


@every_method
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_is_not_finite_is_refused_by_name(method: str, value: float, world: World, tmp_path: Path) -> None:
    broken = {name: tensor.clone() for name, tensor in world.tuned[0].items()}
    broken["experts"][2, 23, 19] = value
    models = [*world.models[1 : COUNT.get(method, 3)], save(tmp_path / "broken", broken)]
    with pytest.raises(EspalierError, match=rf"experts: .*broken has {value} in it"):
        world.merge(method, models)


@every_method
def test_the_merged_model_has_the_weights_of_deltas_in_any_form(method: str, tmp_path: Path) -> None:
    """Deltas as members, GPT-2's transposed matrices among what they change, give what the applied models give."""
    base = tmp_path / "base"
    model = tiny("gpt2")
    model.save_pretrained(base)
    directory = ModelDirectory(base)
    deltas, applied = [], []
    for number in range(COUNT.get(method, 3)):
        delta = store.Delta(*updates(model, number), {"base": {"name": str(base), "fingerprint": directory.fingerprint()}, "settings": {}})
        store.save(tmp_path / f"delta {number}", delta, "")
        apply(str(base), [str(tmp_path / f"delta {number}")], str(tmp_path / f"applied {number}"), quiet=True)
        deltas.append(str(tmp_path / f"delta {number}"))
        applied.append(str(tmp_path / f"applied {number}"))
    options = dict(REQUIRED.get(method, {}))
    if method in NEEDS_FILES:
        tensors = {name: directory.read(name) for name in directory}
        for number in range(3):
            write_statistics(tmp_path / f"{number}.calibration", tensors, number)
        options["statistics"] = [str(tmp_path / f"{number}.calibration") for number in range(3)]
    made = []
    for name, members in (("deltas", deltas), ("models", applied)):
        merge(members, str(tmp_path / name), method=method, model=str(base), quiet=True, **options)
        made.append({n: ModelDirectory(tmp_path / name).read(n) for n in directory})
    for name, tensor in made[1].items():
        torch.testing.assert_close(made[0][name], tensor, rtol=2e-6, atol=2e-6)


def updates(model: torch.nn.Module, seed: int) -> tuple[dict[str, Update], dict[str, store.Layout]]:
    """An update of another form for each parameter in turn."""
    made: dict[str, Update] = {}
    layouts = {target.name: store.Layout.of(target) for target in parameters(model)}
    for number, target in enumerate(parameters(model)):
        shape, draw = target.shape, 1000 * seed + 10 * number
        forms: list[Update] = [Dense(0.1 * random(draw, *shape))]
        index = random(draw + 2, math.prod(shape)).topk(max(math.prod(shape) // 3, 1)).indices.sort().values
        forms.append(Sparse(0.1 * random(draw + 1, len(index)), index, shape))
        forms.append(Replace(random(draw + 3, *shape)))
        if len(shape) == 2:
            places = torch.tensor([1, 4, 6])
            forms.append(LowRank(random(draw, shape[0], 4) / 4, random(draw + 1, 4, shape[1]) / 4, 0.5, shape))
            forms.append(Rows(random(draw, 3, shape[1]), places, shape[0], 0.5, shape))
            forms.append(Columns(random(draw, shape[0], 3), places, shape[1], 0.5, shape))
        made[target.name] = forms[number % len(forms)]
    return made, layouts
