"""A merge whose numbers are to be chosen, asked on a live model: what searchers of ``search/`` see (``delta/searching.py``)."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from espalier import registry
from espalier.attach.device import pick_device
from espalier.attach.load import load_config, load_model, load_tokenizer
from espalier.data.batches import Order, Window, divide, make_batch
from espalier.data.encode import Encoder
from espalier.data.sources import open_source
from espalier.data.store import TokenStore, open_store
from espalier.delta import searching
from espalier.delta.searching import Slopes
from espalier.display import Display
from espalier.errors import EspalierError, at_least
from espalier.evaluate.perplexity import score
from espalier.exchange import merge_plan
from espalier.exchange.answers import Answers
from espalier.exchange.block_outputs import block_outputs
from espalier.exchange.live_merge import Live, itself
from espalier.exchange.merge_recipe import Recipe, block_of
from espalier.exchange.merge_space import Space
from espalier.exchange.merging import Method
from espalier.memory.language_loss import run_batch
from espalier.memory.training_form import training_form
from espalier.plan.memory import default_chunk
from espalier.train import session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FROM_RECIPE = ("model", "vocabulary", "dtype", "any_base", "seed", "shard_size")
"""What a candidate of another method has of the user's recipe."""


@dataclass(frozen=True)
class Trial:
    """A candidate and what it loses: on each data set in nats per token, and over all."""

    number: int
    recipe: searching.Recipe
    about: str
    losses: Mapping[str, float]
    loss: float


class MergeProblem(searching.Problem):
    """The problem of one search.

    Args:
        space: the recipe and what it leaves open.
        recipe: the recipe with every gene in the middle.
        models: its models.
        data: data sets whose loss counts.
        relative: whether a loss is divided by that of the best single model, for each data set.
        answers: what was asked before.
        progress: called with how many trials and gradients there were, and the lowest loss.
        stack: keeps the live model ready until it is closed.
    """

    def __init__(
        self, space: Space, recipe: Recipe, models: merge_plan.Opened, *, data: Sequence[str], relative: bool, budget: int, seed: int,
        answers: Answers, sequence_length: int | None, micro_batch_size: int, device: str | None, display: Display, stack: ExitStack,
        progress: Callable[[int, int, float], Any],
    ) -> None:  # fmt: skip
        at_least("micro_batch_size", micro_batch_size, 1)
        blocks = [1 + max((b for name in member.names if (b := block_of(name)) is not None), default=-1) for member in models.members]
        super().__init__(space.genes, budget, seed, [i.path for i in recipe.models], models.base_name, blocks, len(data))
        self.space, self._recipe, self._answers, self._relative = space, recipe, answers, relative
        self._data, self._sequence_length, self._micro_batch_size = tuple(data), sequence_length, micro_batch_size
        self._device, self._display, self._stack, self._progress = device, display, stack, progress
        self._opened = {self._models_key(recipe): models}
        self._live: Live | None = None
        self._live_key: Any = None
        self._form = ExitStack()
        stack.callback(lambda: self._form.close())
        self._stores: dict[tuple[str, str], TokenStore] = {}
        self._orders: dict[str, Order] = {}
        self._positions = dict.fromkeys(range(len(data)), 0)
        self._alone: dict[tuple[int | None, tuple[str, ...]], Mapping[str, float]] = {}
        self._steps = 0
        self.trials: list[Trial] = []
        self.notes: list[str] = []

    # what searchers ask

    def at(self, places: Sequence[float]) -> searching.Recipe:
        return self.space.at(places)

    def recipe(self, method: str, weights: Sequence[float] | None = None, *, with_base: bool = False, own_base: bool = True, **entries: Any) -> searching.Recipe:
        models: list[dict[str, Any]] = [{"path": path} for path in self.paths]
        if with_base and self.base is not None:
            models.append({"path": self.base})
        for model, weight in zip(models, weights or (), strict=bool(weights)):
            model["weight"] = weight
        kept = self._recipe.model_dump(include=set(FROM_RECIPE), exclude_defaults=True, mode="json")
        if not own_base:
            kept.pop("model", None)
            if any((Path(path) / "delta.json").exists() for path in self.paths):
                kept["model"] = self.base  # what deltas are changes of, wherever it is now
        return {"method": method, "models": models, **kept, **entries}

    def stream_outputs(self) -> list[str]:
        live, items = self._become(self.recipe("passthrough", own_base=False) | {"models": [{"path": self.paths[0]}]})
        self._form.close()  # what follows asks the model as it is
        self._live = self._live_key = None
        return block_outputs(live.model, [item.name for item in items])

    def loss(self, recipe: searching.Recipe, about: str) -> float:
        number = len(self.trials) + 1
        genes = {"genes": {gene.name: self.space.value(recipe, gene) for gene in self.genes}} if self.genes else {}
        record = self._answers.to(["loss", recipe, self._data], lambda: {"trial": number, **genes, **self._tried(recipe, about)})
        losses = {name: math.inf if loss is None else float(loss) for name, loss in record["losses"].items()}
        self.trials.append(Trial(number, recipe, about, losses, self.objective(losses)))
        self._progress(number, self._steps, self.best.loss)
        return self.trials[-1].loss

    def alone(self, model: int) -> float:
        return self.objective(self.losses_alone(model))

    def slopes(self, recipe: searching.Recipe, *, entropy: bool = False, sequences: int = 8, data: int | None = None, density: float = 1.0) -> Slopes:
        chosen = range(len(self._data)) if data is None else [data]
        places = [self._positions[number] for number in chosen]
        for number in chosen:
            self._positions[number] += sequences
        question = ["slopes", recipe, [self._data[n] for n in chosen], places, entropy, sequences, density]

        def find() -> dict[str, Any]:
            live, items = self._become(recipe)
            for number, position in zip(chosen, places, strict=True):
                self._backward(live.model, self._data[number], position, sequences, 1 / len(chosen), entropy)
            found = live.slopes(items, density)
            if not all(bool(numbers.isfinite().all()) for numbers in found.values()):
                raise EspalierError(f"trial {len(self.trials)} led to a model whose gradient is not finite; is one of the models damaged?")
            live.model.zero_grad(set_to_none=True)
            return {"slopes": {name: numbers.tolist() for name, numbers in found.items()}}

        record = self._answers.to(question, find)
        self._steps += 1
        self._progress(len(self.trials), self._steps, self.best.loss)
        return {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in record["slopes"].items()}

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._display.note(text)

    # what the verb asks

    @property
    def best(self) -> Trial:
        """The trial of the lowest loss, the first of equal ones."""
        return min(self.trials, key=lambda trial: trial.loss)

    def objective(self, losses: Mapping[str, float]) -> float:
        """The mean of the losses on data sets; of their ratios to those of the best single model where they are relative."""
        if not self._relative:
            return sum(losses.values()) / len(losses)
        names = list(losses)
        alone = [self.losses_alone(model, None if names == list(self._data) else names) for model in range(self.models)]
        return sum(loss / min(found[name] for found in alone) for name, loss in losses.items()) / len(losses)

    def losses_alone(self, model: int | None, data: Sequence[str] | None = None) -> Mapping[str, float]:
        """What one of the models loses by itself on each data set; ``None`` is the base."""
        names = self._data if data is None else tuple(data)
        if (model, names) in self._alone:
            return self._alone[model, names]
        path = self.base if model is None else self.paths[model]
        assert path is not None
        recipe: searching.Recipe = {"method": "passthrough", "models": [{"path": path}]}
        if (Path(path) / "delta.json").exists():
            recipe |= {"model": self.base, "any_base": self._recipe.any_base}
        self._alone[model, names] = found = self.losses(recipe, f"alone: {path}", names)
        return found

    def losses(self, recipe: searching.Recipe, about: str, data: Sequence[str] | None = None) -> Mapping[str, float]:
        """What a recipe that is no trial loses on each data set (default: those of the search)."""
        names = self._data if data is None else tuple(data)

        def find() -> dict[str, Any]:
            found = self._measured(recipe, names)
            for name, loss in found.items():
                if not math.isfinite(loss):
                    raise EspalierError(f"{about}: the loss on {name} is {loss}; is the model damaged?")
            return {"about": about, "losses": found}

        record = self._answers.to(["losses", recipe, names], find)
        return {name: float(loss) for name, loss in record["losses"].items()}

    # the live model

    @staticmethod
    def _models_key(recipe: Recipe) -> tuple[Any, ...]:
        return (tuple(i.path for i in recipe.models), recipe.model, recipe.any_base)

    def _tried(self, recipe: searching.Recipe, about: str) -> dict[str, Any]:
        try:
            losses: Mapping[str, float | None] = {n: v if math.isfinite(v) else None for n, v in self._measured(recipe, self._data).items()}
            return {"about": about, "losses": losses}
        except EspalierError as error:
            if not self.trials:  # what is wrong with the first is wrong with all
                raise
            return {"about": f"{about}: {error}", "losses": dict.fromkeys(self._data)}

    def _measured(self, recipe: searching.Recipe, data: Sequence[str]) -> dict[str, float]:
        live, _ = self._become(recipe)
        length = session.fitting_length(self._sequence_length, live.model.config)
        tokens = length * self._micro_batch_size
        return {
            name: score(live.model, self._store(name), length, tokens, padded=self._padded, pad_token=self._pad_token).loss for name in data
        }  # fmt: skip

    def _backward(self, model: PreTrainedModel, data: str, position: int, sequences: int, share: float, entropy: bool) -> None:
        store = self._store(data)
        length = session.fitting_length(self._sequence_length, model.config)
        order = self._orders.setdefault(f"{data} {length} {store.path}", Order(store, length, self.seed))
        windows: list[Window] = []
        epoch = 0
        while position >= order.count(epoch):
            position, epoch = position - order.count(epoch), epoch + 1
        while len(windows) < sequences:
            if position >= order.count(epoch):
                position, epoch = 0, epoch + 1
            windows.append(order.window(epoch, position))
            position += 1
        micro_tokens = length * self._micro_batch_size
        device = next(model.parameters()).device
        batches = [make_batch(store, some, micro_tokens, self._padded, self._pad_token) for some in divide(windows, micro_tokens, self._padded)]
        total = max(sum(batch.target_count for batch in batches), 1)
        model.eval()
        for batch in batches:
            run_batch(model, batch.to(device), share / total, kind="entropy" if entropy else "cross_entropy").backward()

    def _store(self, data: str) -> TokenStore:
        key = (data, self._encoder.fingerprint)
        if key not in self._stores:
            self._stores[key] = open_store(open_source(data), self._encoder)
        return self._stores[key]

    def _become(self, content: searching.Recipe) -> tuple[Live, list[Any]]:
        recipe = Recipe.of(content, "the candidate")
        key = self._models_key(recipe)
        models = self._opened.get(key) or merge_plan.opened(recipe)
        self._opened[key] = models
        items, alignment = merge_plan.items(recipe, models)
        wide = any(item.dtype in ("F32", "F64") for item in items)
        dtype = torch.float32 if wide else torch.bfloat16  # as load_model takes it of what espalier merge writes
        info = registry.find(recipe.method, "merger")
        method = Method.of(info, registry.load(info))
        if recipe.stack is None and alignment is None:
            self._make_live((models.like.path, dtype), items, lambda: self._loaded(models, dtype))
        else:
            with tempfile.TemporaryDirectory() as folder:
                merge_plan.write_beside(Path(folder), recipe, models, items, alignment)
                config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
                shape = json.dumps([config, alignment is not None, str(models.like.path)], sort_keys=True)
                self._make_live((shape, dtype), items, lambda: self._made(Path(folder), dtype))
        assert self._live is not None
        self._live.become(items, method, recipe.seed)
        return self._live, items

    def _make_live(self, key: Any, items: list[Any], load: Callable[[], tuple[PreTrainedModel, Any, list[Any]]]) -> None:
        if key == self._live_key:
            return
        self._form.close()
        self._live = self._live_key = None  # one at a time is in memory
        model, tokenizer, stored = load()
        self._encoder = Encoder(tokenizer)
        self._pad_token = session.pad_token(tokenizer)
        self._padded = session.must_pad(model, model.config.vocab_size, self._display)
        live = Live(model, items)
        if stored:
            info = registry.find("passthrough", "merger")
            live.require_same([item for item in stored if item.is_merged], Method.of(info, registry.load(info)))
        self._form.enter_context(training_form(model, chunk=default_chunk(model.config.vocab_size), recompute=False, padded=self._padded))
        self._live, self._live_key = live, key

    def _loaded(self, models: merge_plan.Opened, dtype: torch.dtype) -> tuple[PreTrainedModel, Any, list[Any]]:
        path = models.like.path
        return load_model(path, dtype, self._device), load_tokenizer(path), itself(models)

    def _made(self, folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any, list[Any]]:
        import transformers

        model = transformers.AutoModelForCausalLM.from_config(load_config(folder), dtype=dtype)
        return torch.nn.Module.to(model, pick_device(self._device)).eval(), load_tokenizer(folder), []
