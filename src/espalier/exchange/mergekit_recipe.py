"""mergekit's YAML, translated into a recipe: written from its documented format. What has no equivalent is refused by name.

Its rules: a setting of a model (or source) goes before that of its slice, and that before the one of the whole; a list of
numbers is a gradient over the blocks of the slice; a list of ``{filter, value}`` is for the first filter that is part of
the tensor's name. Ours: of several overrides the last one says; so they are written down in the opposite order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from espalier.errors import EspalierError, suggestion
from espalier.exchange import merge_recipe

_TOP = {
    "merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "chat_template", "modules",
}  # fmt: skip
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_TASK = {"weight": "weight", "lambda": "scale", "normalize": "normalize", "int8_mask": None, "rescale": "rescale", "density": "density"}
_METHODS: dict[str, tuple[str, dict[str, Any], dict[str, str | None], dict[str, Any]]] = {
    # name: ours, options that it always has, its parameters by their names here (None: without meaning here), its defaults
    "linear": ("linear", {}, {"weight": "weight", "normalize": "normalize"}, {"normalize": True}),
    "task_arithmetic": ("task_arithmetic", {}, {**_TASK, "density": None}, {"normalize": False}),
    "ties": ("ties", {"majority": "mass"}, _TASK, {"normalize": True, "density": 1.0}),
    "dare_linear": ("dare", {"elect": "none"}, _TASK, {"normalize": False, "rescale": True, "density": 1.0}),
    "dare_ties": ("dare", {"elect": "mass"}, _TASK, {"normalize": False, "rescale": True, "density": 1.0}),
    "della": ("della", {"elect": "mass"}, {**_TASK, "epsilon": "epsilon"}, {"normalize": True, "rescale": True, "density": 1.0, "epsilon": 0.15}),
    "della_linear": (
        "della", {"elect": "none"}, {**_TASK, "epsilon": "epsilon"}, {"normalize": False, "rescale": True, "density": 1.0, "epsilon": 0.15}
    ),
    "breadcrumbs": ("breadcrumbs", {"per": "tensor", "elect": "none"}, {**_TASK, "gamma": "gamma"}, {"normalize": False, "density": 1.0, "gamma": 0.01}),
    "breadcrumbs_ties": (
        "breadcrumbs", {"per": "tensor", "elect": "mass"}, {**_TASK, "gamma": "gamma"}, {"normalize": False, "density": 1.0, "gamma": 0.01}
    ),
    "slerp": ("slerp", {}, {"t": "t"}, {}),
    "nuslerp": ("slerp", {}, {"weight": "weight", "nuslerp_row_wise": None, "nuslerp_flatten": "per"}, {"per": "tensor"}),
    "multislerp": ("multislerp", {}, {"weight": "weight", "normalize_weights": "normalize"}, {"normalize": True}),
    "model_stock": ("model_stock", {}, {"filter_wise": "per"}, {"per": "tensor"}),
    "sce": ("sce", {}, {"select_topk": "density", "int8_mask": None}, {"density": 1.0}),
    "karcher": ("karcher", {}, {"max_iter": "iterations", "tol": "tolerance"}, {}),
    "passthrough": ("passthrough", {}, {"scale": "scale"}, {}),
    "nearswap": ("nearswap", {}, {"t": "t"}, {}),
}  # fmt: skip
_WITH_BASE = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "slerp", "model_stock", "sce", "nearswap")
_OF_MODELS = ("linear", "karcher", "passthrough")
"""Methods to which the base is a model like any other."""
_NEEDS_WEIGHT = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "nuslerp", "multislerp")
_SWITCHES = ("normalize", "rescale", "per")
_OF_ONE_MODEL = ("weight", "density", "gamma", "epsilon", "scale")
"""What mergekit looks up for each model; it would pass over anything else that is said of one."""


def read(where: str) -> dict[str, Any]:
    """The entries of a recipe file; one of mergekit's is translated.

    Raises:
        EspalierError: when it cannot be read, or has no equivalent.
    """
    content = merge_recipe.read(Path(where))
    return translated(content, where) if is_mergekit(content) else content


def is_mergekit(content: Mapping[str, Any]) -> bool:
    """Whether the entries of a file are mergekit's."""
    return "merge_method" in content


class _Translation:
    def __init__(self, content: Mapping[str, Any], where: str) -> None:
        self.content, self.where = content, where
        if unknown := [key for key in content if key not in _TOP]:
            raise self.error(f"{unknown[0]!r} is no entry of a mergekit recipe{suggestion(str(unknown[0]), sorted(_TOP))}")
        self.method = content["merge_method"]
        if not isinstance(self.method, str) or self.method not in _METHODS:
            names = ", ".join(_METHODS)
            raise self.error(f"mergekit's method {self.method!r} has no equivalent{suggestion(str(self.method), list(_METHODS))} (there are: {names})")
        self.name, fixed, self.known, defaults = _METHODS[self.method]
        self.options = {**fixed, **{key: self.of_option(key, value) for key, value in defaults.items()}}
        self.paths: list[str] = []
        self.overrides: list[dict[str, Any]] = []
        self.base = self.path(content["base_model"], "base_model") if content.get("base_model") is not None else None

    def error(self, text: str) -> EspalierError:
        return EspalierError(f"{self.where}: {text}")

    def path(self, model: Any, entry: str) -> str:
        """The directory or id that a reference to a model names."""
        if isinstance(model, dict) and set(model) == {"model"}:
            model = model["model"]
        if isinstance(model, dict) and set(model) == {"path"}:
            model = model["path"]
        if isinstance(model, dict):
            more = sorted(set(model) - {"model", "path"})
            raise self.error(f"{entry}: {more[0] if more else 'this'} of a model has no equivalent; make a model directory of it first")
        if not isinstance(model, str) or not model:
            raise self.error(f"{entry}: {model!r} names no model")
        if "+" in model:
            raise self.error(f"{entry}: an adapter on a model ({model}) has no equivalent; import it with espalier convert, and merge the deltas")
        return model

    def index(self, model: str) -> int:
        """The place of a model in the list, to which it is added."""
        if model not in self.paths:
            self.paths.append(model)
        return self.paths.index(model)

    # settings

    def of_option(self, option: str, value: Any) -> Any:
        """A setting's value as the option of the method here means it."""
        if option == "rescale":
            if self.name in ("ties", "breadcrumbs", "task_arithmetic"):
                if value and self.name != "task_arithmetic":
                    raise self.error(f"parameters: rescale of {self.method} has no equivalent; leave it out")
                return None
            return "norm" if value else "none"
        if option == "per" and isinstance(value, bool):
            return "row" if value == (self.method == "model_stock") else "tensor"
        return value

    def scalar(self, option: str, value: Any, entry: str) -> Any:
        """A number (or switch), or a gradient of numbers."""
        if isinstance(value, list):
            numbers = [self.scalar(option, item, entry) for item in value]
            if not numbers or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
                raise self.error(f"{entry}: a gradient must be of numbers, it is {value!r}")
            return {"depth": [float(n) for n in numbers]}
        if option in _SWITCHES:
            if not isinstance(value, bool):
                raise self.error(f"{entry} is {value!r}; it must be true or false")
            return self.of_option(option, value)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError as error:
                raise self.error(f"{entry} is {value!r}; it must be a number") from error
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{entry} is {value!r}; it must be a number")
        return value

    def conditions(self, option: str, setting: Any, entry: str) -> Iterator[tuple[list[str] | None, Any]]:
        """(globs of names or all, value) of a setting, the one that counts most last."""
        entries = setting if isinstance(setting, list) and any(isinstance(item, dict) for item in setting) else [setting]
        for item in reversed(entries):
            if not isinstance(item, dict):
                yield None, self.scalar(option, item, entry)
                continue
            if set(item) - {"filter", "value"} or "value" not in item:
                raise self.error(f"{entry}: {item!r} is no filter with a value")
            part = item.get("filter")
            glob = None if part is None or part == "*" else ["*" + "".join(f"[{c}]" if c in "*?[" else c for c in str(part)) + "*"]
            yield glob, self.scalar(option, item["value"], entry)

    def add(self, parameters: Any, entry: str, part: int | None = None, model: int | None = None) -> None:
        """Write the settings of one place down as overrides; of all models, or of one."""
        if parameters is None:
            return
        if not isinstance(parameters, dict):
            raise self.error(f"{entry} must be settings by name")
        for key, setting in parameters.items():
            place = f"{entry}.{key}"
            if key == "nuslerp_row_wise":  # which goes along the other dimension than its name says
                if setting is not False:
                    raise self.error(f"{place}: an arc for each column has no equivalent")
                continue
            if key not in self.known:
                raise self.error(f"{place} has no equivalent in {self.name}{suggestion(str(key), list(self.known))}")
            option = self.known[key]
            if option is None:
                continue
            if model is not None and key not in _OF_ONE_MODEL:
                raise self.error(f"{place} is of all models; say it under parameters of the recipe or the slice")
            for glob, value in self.conditions(option, setting, place):
                override: dict[str, Any] = {"names": glob, "part": part}
                each = [value if model in (None, i) else None for i in range(len(self.paths))]
                if option == "weight":
                    override["weights"] = each
                elif option == "scale":
                    override["scale"] = value
                elif value is not None:
                    override["options"] = {option: value if model is None else each}
                self.overrides.append({k: v for k, v in override.items() if v is not None})

    # what is merged

    def refuse(self, mapping: Any, known: set[str], entry: str) -> None:
        if not isinstance(mapping, dict):
            raise self.error(f"{entry} must have entries such as model")
        for key in mapping:
            if key not in known:
                raise self.error(f"{entry}.{key} has no equivalent{suggestion(str(key), sorted(known))}")

    def sources(self, listed: Any, entry: str, known: set[str]) -> list[tuple[str, dict[str, Any]]]:
        """(path, what is said of it) of the models of a list; the base, where it is no model like the others, apart."""
        if not isinstance(listed, list) or not listed:
            raise self.error(f"{entry} must be a list of models")
        found = []
        for number, source in enumerate(listed):
            self.refuse(source, {"model", *known}, f"{entry}.{number}")
            found.append((self.path(source.get("model"), f"{entry}.{number}.model"), source))
        return found

    def is_merged(self, path: str) -> bool:
        return self.method in _OF_MODELS or path != self.base

    def models(self) -> None:
        found = self.sources(self.content["models"], "models", {"parameters"})
        merged = [(path, source) for path, source in found if self.is_merged(path)]
        if self.method in _OF_MODELS and self.base is not None and self.base not in [path for path, _ in merged]:
            merged.append((self.base, {}))
        if self.method == "slerp":
            merged = [(str(self.base), {}), *merged]
        for path, _ in merged:
            self.index(path)
        if len(self.paths) != len(merged):
            raise self.error("models: the same model is listed twice, which has no equivalent; give it the sum of the weights")
        self.add(self.content.get("parameters"), "parameters")
        for path, source in merged:
            self.add(source.get("parameters"), f"models.{path}.parameters", None, self.index(path))

    def slices(self) -> list[dict[str, Any]]:
        if not isinstance(self.content["slices"], list) or not self.content["slices"]:
            raise self.error("slices must be a list")
        parts = []
        for number, piece in enumerate(self.content["slices"]):
            entry = f"slices.{number}"
            self.refuse(piece, {"sources", "parameters"}, entry)
            parts.append((entry, piece, self.sources(piece.get("sources"), f"{entry}.sources", {"layer_range", "parameters"})))
        for _, _, found in parts:
            for path, _ in found:
                if self.is_merged(path) or self.method == "slerp":
                    self.index(path)
        if self.method == "slerp":
            self.paths.sort(key=lambda path: path != self.base)
        stack = []
        for part, (entry, piece, found) in enumerate(parts):
            blocks: dict[int, list[int]] = {}
            based = None
            for path, source in found:
                span = source.get("layer_range")
                if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span) and 0 <= span[0] < span[1]):
                    raise self.error(f"{entry}: layer_range is {span!r}; it must be [first, the one after the last]")
                based = span if path == self.base else based
                if path in self.paths:
                    if self.paths.index(path) in blocks:
                        raise self.error(f"{entry}: the same model is listed twice, which has no equivalent")
                    blocks[self.paths.index(path)] = span
            if not blocks or len({stop - start for start, stop in blocks.values()}) != 1:
                raise self.error(f"{entry}: the sources must be equally many layers of at least one model beside the base")
            if self.method in _WITH_BASE and based is None:
                raise self.error(f"{entry}: {self.method} needs the base among the sources")
            self.add(self.content.get("parameters"), "parameters", part)  # for each slice, over which gradients run
            self.add(piece.get("parameters"), f"{entry}.parameters", part)
            for path, source in found:
                if path in self.paths:
                    self.add(source.get("parameters"), f"{entry}.sources.{path}.parameters", part, self.paths.index(path))
            stack.append({"blocks": {i: blocks[i] for i in sorted(blocks)}, **({"base": based} if based and self.base else {})})
        return stack

    def nuslerp(self, parts: int) -> None:
        """Its weights say how far to go from the first model to the second."""
        if len(self.paths) != 2:
            raise self.error(f"nuslerp is between two models beside the base, there are {len(self.paths)}")
        totals: list[Any] = [None, None]
        rest = [override for override in self.overrides if "weights" not in override]
        for override in self.overrides:
            if override in rest:
                continue
            if "names" in override or ("part" in override and parts > 1) or "depth" in str(override):
                raise self.error("weights of nuslerp that change with the tensor have no equivalent; use slerp and its t")
            totals = [new if new is not None else old for new, old in zip(override.pop("weights"), totals, strict=True)]
        self.require_weights(totals)
        self.overrides = rest
        total = sum(totals)
        self.options.update(t=totals[1] / total if abs(total) >= 1e-6 else 0.5, of="updates" if self.base else "models")

    def require_weights(self, weights: Sequence[Any]) -> None:
        for path, weight in zip(self.paths, weights, strict=True):
            if weight is None:
                raise self.error(f"the model {path} has no weight, which {self.method} needs")

    def vocabulary(self) -> str | None:
        source, tokenizer = self.content.get("tokenizer_source"), self.content.get("tokenizer")
        if tokenizer is not None:
            self.refuse(tokenizer, {"source"}, "tokenizer")
            source = tokenizer.get("source", "union")
        if self.content.get("chat_template") not in (None, "auto"):
            raise self.error("chat_template has no equivalent; put the template into the new model's chat_template.jinja")
        if source in (None, "union", "base"):
            return source
        if self.path(source, "tokenizer_source") in (self.base, self.base or self.paths[0]):
            return "base"
        raise self.error(f"tokenizer_source {source!r} has no equivalent but base (the base's, or else the first model's) and union")

    def recipe(self) -> dict[str, Any]:
        if self.content.get("modules") is not None:
            raise self.error("modules have no equivalent; use models, and filters on the names of tensors")
        if (self.content.get("models") is None) == (self.content.get("slices") is None):
            raise self.error("there must be either models or slices")
        if self.method in _WITH_BASE and self.base is None:
            raise self.error(f"{self.method} needs a base_model")
        stack = None
        if self.content.get("slices") is not None:
            stack = self.slices()
        else:
            self.models()
        made: dict[str, Any] = {"method": self.name}
        if self.method in _NEEDS_WEIGHT and self.method != "nuslerp":
            self.require_weights([
                next((o for o in self.overrides if o.get("weights", [None] * len(self.paths))[i] is not None), None) for i in range(len(self.paths))
            ])
        if self.method == "nuslerp":
            self.nuslerp(len(stack or []))
        if self.method == "multislerp" and self.base is not None:
            self.options["of"] = "updates"
        if self.method in ("slerp", "nearswap") and not any("t" in o.get("options", {}) for o in self.overrides):
            raise self.error(f"{self.method} needs the parameter t")
        if self.method in ("slerp", "nearswap") and len(self.paths) != (2 if self.method == "slerp" else 1):
            raise self.error(f"{self.method} is between the base and one other model")
        for key in ("dtype", "out_dtype"):
            if self.content.get(key) not in (None, *_DTYPES):
                raise self.error(f"{key} is {self.content[key]!r}; it must be one of {', '.join(_DTYPES)}")
        made["models"] = [{"path": path} for path in self.paths]
        if self.base is not None:
            made["model"] = self.base
        made["options"] = {key: value for key, value in self.options.items() if value is not None}
        made["parameters"] = self.overrides
        if stack is not None:
            made["stack"] = stack
        if (vocabulary := self.vocabulary()) is not None:
            made["vocabulary"] = vocabulary
        if (dtype := self.content.get("out_dtype") or self.content.get("dtype")) is not None:
            made["dtype"] = _DTYPES[dtype]
        return made


def translated(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The entries of our recipe that mean what those of mergekit's do.

    Args:
        where: the file, named in errors.

    Raises:
        EspalierError: for what has no equivalent, or is malformed.
    """
    return _Translation(content, where).recipe()
