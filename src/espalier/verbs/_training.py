"""The steps that ``tune`` and ``pretrain`` are made of, each a method of one job."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from espalier import registry
from espalier.anatomy.classification import labels_of
from espalier.anatomy.parameters import BLOCK, parameters, select
from espalier.attach.attachment import (
    Statistics,
    attach,
    attachments,
    release_base,
    settle,
    targets_of,
    trainable_parameters,
)
from espalier.attach.branch import Branch
from espalier.attach.coded_base import quantize_base
from espalier.attach.course import Course
from espalier.attach.device import pick_device
from espalier.attach.load import (
    DTYPES,
    MALFORMED,
    empty_model,
    empty_of,
    load_as,
    load_model,
    load_tokenizer,
    put_on,
    torch_dtype,
)
from espalier.attach.method import Method
from espalier.attach.new_tokens import grow
from espalier.budget.fitting import fit, parse_numbers, trained
from espalier.calibrate.footprint import footprint, largest_statistic
from espalier.calibrate.make import make as make_calibration
from espalier.calibrate.statistics import parse_want
from espalier.calibrate.store import Request
from espalier.calibrate.store import find as find_calibration
from espalier.checkpoint.atomic import write_text
from espalier.checkpoint.directory import ModelDirectory, read_json, resolve_model
from espalier.checkpoint.safetensors_file import dtype_name
from espalier.data.encode import MASK_POLICY, Encoder
from espalier.data.sources import open_source
from espalier.data.store import TokenStore, open_store
from espalier.delta import store as delta_store
from espalier.display import Display
from espalier.errors import EspalierError, at_least, one_of
from espalier.exchange import save as saving
from espalier.memory.joined_optimizer import build
from espalier.memory.meter import format_bytes, parse_bytes, peak_memory, release_free_memory, resident_memory
from espalier.memory.training_form import training_form
from espalier.plan import memory as planning
from espalier.plan.trace import Gradients, Traced, trace_step
from espalier.train import checkpoint, mup, reweight, schedules, session
from espalier.train import fork as forks
from espalier.train.laws import knee, step_law
from espalier.train.loop import Settings
from espalier.verbs._combinations import refuse
from espalier.verbs._tasks import Classification, Language, Task, new_classifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Job:
    """One training run, step by step; the arguments are those of the verb."""

    def __init__(self, verb: str, arguments: dict[str, Any], options: dict[str, Any], method: str) -> None:
        self.verb = verb
        arguments = {key: _plain(value) for key, value in arguments.items()}
        arguments["learning_rate"] = _rate(arguments.get("learning_rate"))
        self.a = {
            "targets": None, "full": "rest" if verb == "pretrain" else None, "add_tokens": None, "dropout": 0.0, "floor": 0.0, "label_smoothing": 0.0, "model": None, "trainable": None, "base_bits": None,
            "over": None, "fork": None, "mup": None, "keep_checkpoints": checkpoint.KEPT, "update_in_backward": False, "loss": "cross_entropy", "reweight": None,
            "reweight_temperature": 1.0, "out": None, "epochs": None, "warmup": 0.0, "cooldown": 1.0, "clip": 0.0, "eval_data": None, "eval_every": 0, "checkpoint_every": 0,
            "threads": None, "resume": False, "quiet": False, "data": None,
            **arguments,
        }  # fmt: skip
        self.display = Display(self.a["quiet"])
        self.out = Path(self.a["out"] or ".")
        self._check_arguments()
        self._make_methods(method, options)
        # as the methods took them: "8" from a command line and 8 from Python are one value
        self.given = {**arguments, **{key: self.hyperparameters[key] for key in self.chosen}}
        self.device = pick_device(self.a["device"])
        self.evaluations: dict[str, dict[str, Any]] = {}
        session.seed_everything(self.a["seed"], self.a["threads"])

    def _check_arguments(self) -> None:
        a = self.a
        for name in ("batch_size", "sequence_length", "micro_batch_size", "logits_chunk", "threads", "steps"):
            if a[name] is not None:
                at_least(name, a[name], 1)
        choices = {"schedule": schedules.SHAPES, "loss": ("cross_entropy", "stablemax"), "reweight": get_args(reweight.Shape)}
        for name, allowed in choices.items():
            if a.get(name) is not None:
                one_of(name, a[name], allowed)
        for name in ("eval_every", "checkpoint_every", "keep_checkpoints", "clip"):
            at_least(name, a[name], 0)
        if a["steps"] is not None and a["epochs"] is not None:
            raise EspalierError("give --steps or --epochs, not both")
        if a["epochs"] is not None and not 0 < a["epochs"] < math.inf:
            raise EspalierError(f"epochs is {a['epochs']}; it must be more than 0 and finite")
        if not 0 <= a["warmup"] < 1:
            raise EspalierError(f"warmup is {a['warmup']}; it is a share of the steps, at least 0 and less than 1")
        if not 0 <= a["floor"] <= 1:
            raise EspalierError(f"floor is {a['floor']}; it is a share of the peak rate, from 0 to 1")
        if not 0 < a["cooldown"] <= 1:
            raise EspalierError(f"cooldown is {a['cooldown']}; it is a share of the steps, more than 0 and at most 1")
        if not 0 <= a["label_smoothing"] < 1:
            raise EspalierError(f"label_smoothing is {a['label_smoothing']}; it is a share of every target, at least 0 and less than 1")
        if a["loss"] != "cross_entropy" and a["label_smoothing"]:
            raise EspalierError(f"label_smoothing is {a['label_smoothing']}, which goes with the loss cross_entropy; the loss is {a['loss']}")
        if not 0 < a["reweight_temperature"] < math.inf:
            raise EspalierError(f"reweight_temperature is {a['reweight_temperature']}; it must be more than 0 and finite")
        if a["learning_rate"] not in (None, "auto") and not 0 < a["learning_rate"] < math.inf:
            raise EspalierError(f"learning_rate is {a['learning_rate']}; it must be more than 0 and finite")
        if a["base_bits"] is not None:
            one_of("base_bits", a["base_bits"], (4, 8))
        self.budget = parse_bytes(a["budget"]) if a["budget"] else None
        for name in ("eval_data", "over"):
            if isinstance(a[name], str):
                a[name] = [a[name]]
        import os

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise EspalierError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: this version trains in one process; run it without torchrun")

    def _make_methods(self, name: str, options: dict[str, Any]) -> None:
        infos = {"method": registry.find(name, registry.ATTACHED), "optimizer": registry.find(self.a["optimizer"], "optimizer")}
        given, self.spelt = registry.share_out(infos, options)
        self.chosen = [self.spelt[part, key] for part, own in given.items() for key in own if (part, key) in self.spelt]
        self.optimizer_method = registry.make(self.a["optimizer"], "optimizer", **given["optimizer"])
        self.optimizer_method.state, self.optimizer_method.seed = self.a["state"], self.a["seed"]
        self.optimizer_method.check()
        self.method = registry.make(name, registry.ATTACHED, **given["method"])
        self._check_gradients()
        made = {"method": self.method, "optimizer": self.optimizer_method}
        self.hyperparameters = {spelt: _plain(getattr(made[part], key)) for (part, key), spelt in sorted(self.spelt.items())}
        self.a["targets"] = self.a["targets"] or self.method.targets
        if self.a["learning_rate"] is None:
            self.a["learning_rate"] = self.method.learning_rate
        refuse(self.method, self.optimizer_method)

    def _check_gradients(self) -> None:
        """How many of a step's gradients are there at once, and what cannot be had without all of them.

        Raises:
            EspalierError: naming the option or the method.
        """
        a, is_blind = self.a, getattr(self.optimizer_method, "zeroth_order", False)
        self.gradients: Gradients = "none" if is_blind else "few" if a["update_in_backward"] else "all"
        if is_blind and a["update_in_backward"]:
            raise EspalierError(f"{a['optimizer']} has no backward pass; leave out --update-in-backward")
        if self.gradients == "all":
            return
        what = "--update-in-backward" if a["update_in_backward"] else f"--optimizer {a['optimizer']}"
        if a["clip"]:
            raise EspalierError(f"{what} never has the gradients of all parameters, so their norm cannot be clipped (clip is {a['clip']:g}); give --clip 0")
        self.method.check_without_gradients(what, is_blind=is_blind)
        adds_up = getattr(self.optimizer_method, "adds_up", lambda: False)()
        if a["update_in_backward"] and not adds_up:
            if a["micro_batch_size"] not in (None, a["batch_size"]):
                raise EspalierError(
                    f"--update-in-backward with --optimizer {a['optimizer']} needs whole gradients, so micro_batch_size, which is {a['micro_batch_size']}, must be "
                    f"that of the batch, {a['batch_size']}; or take galore --choice random or frugal --rest-rule none, whose gradients add up in a small form"
                )
            a["micro_batch_size"] = a["batch_size"]

    # -- the run's folder

    def _defaults(self) -> dict[str, Any]:
        """Those of the verb's options: what runs had that were recorded when there were fewer."""
        verb = getattr(importlib.import_module(f"espalier.verbs.{self.verb}"), self.verb)
        return {name: p.default for name, p in inspect.signature(verb).parameters.items() if p.default is not p.empty}

    def finished(self) -> dict[str, Any] | None:
        """The report of a run that was resumed after its end, else nothing.

        Raises:
            EspalierError: when ``--out`` holds something else than this run, before anything is read or loaded.
        """
        path = self.out / "run" / "result.json"
        if session.earlier_run(self.out, self.verb, self.given, self.a["resume"], self._defaults()) is not None and path.exists():
            self.display.note(f"the run in {self.out} is finished")
            return read_json(path)
        return None

    # -- data

    def read_model(self) -> None:
        """What a model is: config, the deltas that are trained over, and new tokens; no weights."""
        a = self.a
        self.directory: ModelDirectory | None = None
        if a["model"] is not None:
            if a.get("architecture"):
                raise EspalierError("give --model or --architecture, not both")
            self.directory = ModelDirectory(resolve_model(a["model"]))
            self.tokenizer_at, self.config_at = a.get("tokenizer") or a["model"], self.directory.path
        else:
            if not (a.get("architecture") and (a.get("tokenizer") or self.verb == "plan")):
                raise EspalierError("give --model DIR to go on from, or --architecture config.json and --tokenizer DIR to begin")
            self.tokenizer_at, self.config_at = a.get("tokenizer"), Path(a["architecture"])
        self.config = _config(self.config_at)
        self.widths = self._widths(self.config_at) if a["mup"] is not None else None
        self.over = [self._below(Path(folder)) for folder in a["over"] or ()]
        if a["trainable"] is not None and not self.method.by_task:  # how much that trains, the data decide too
            self._fit_method(parse_numbers(a["trainable"]), self.config_at)
        taken = self.method.positions() if isinstance(self.method, Branch) else 0
        a["sequence_length"] = session.fitting_length(a["sequence_length"], self.config, taken)
        self.full: list[str] = a["full"].split(",") if a["full"] else []
        self.new_tokens: list[int] = []
        if self.verb != "plan" or a["data"] or a["add_tokens"]:
            self._read_tokenizer()

    def _read_tokenizer(self) -> None:
        a = self.a
        if self.tokenizer_at is None:
            raise EspalierError("what --data or --add-tokens need is a tokenizer; give --tokenizer DIR")
        self.tokenizer = load_tokenizer(self.tokenizer_at)
        known = len(self.tokenizer)
        self.new_tokens = _add_tokens(self.tokenizer, a["add_tokens"]) if a["add_tokens"] else []
        self.encoder = Encoder(self.tokenizer)
        if known > self.config.vocab_size:
            raise EspalierError(f"the tokenizer in {self.tokenizer_at} has {known} tokens, the model {self.config.vocab_size}")
        if self.new_tokens:
            self.config.vocab_size = max(self.config.vocab_size, len(self.tokenizer))

    def read_data(self) -> None:
        """Token stores, and what they decide of model and method."""
        a = self.a
        self.store = self._open(a["data"])
        self.eval_stores = {name: self._open(name) for name in a["eval_data"] or ()}
        if self.method.by_task:
            self._take_tasks()
            if a["trainable"] is not None:
                self._fit_method(parse_numbers(a["trainable"]), self.config_at)
        self._choose_task()
        self.order = self.task.order(self.store, a["sequence_length"], a["seed"])
        if a["steps"] is None:
            a["steps"] = math.ceil((a["epochs"] or 1.0) * self.order.steps_of_epoch(a["batch_size"] * a["sequence_length"]))
        if a["learning_rate"] == "auto":
            self._take_advice(self.config_at)
        self.fork = self._take_fork() if a["fork"] is not None else None

    def _take_fork(self) -> forks.Fork | None:
        """What a fork has of its trunk: as many steps of warm-up, and how a step is cut; nothing to begin with where it is resumed.

        Raises:
            EspalierError: when it cannot be a continuation of its trunk.
        """
        a, run = self.a, self.out / "run"
        begun = a["resume"] and bool(checkpoint.steps(run / "checkpoints"))
        fork = None if begun else forks.find(a["fork"], self._defaults())
        before = fork.record.resolved if fork else session.read_record(run / "run.json", self._defaults()).resolved
        a["warmup"] = round(before["warmup"] * before["steps"]) / a["steps"]
        for key in ("micro_batch_size", "recompute", "logits_chunk"):
            a[key] = before[key] if a[key] is None else a[key]
        if fork:
            moves = any(getattr(type(self.method), hook) is not getattr(Method, hook) for hook in ("frozen", "before_step", "after_step"))
            if moves and before["steps"] != a["steps"]:
                raise EspalierError(f"--fork {a['fork']}: what {self.method.name} does in a run may go by its length, which was {before['steps']} steps there")
            rate, rate_then = (Settings(batch_tokens=0, micro_tokens=0, **_rates(of)).rate for of in (a, before))
            fork.check(self.verb, self._resolved(), self._facts(), rate, rate_then)
        return fork

    def _resolved(self) -> dict[str, Any]:
        return {**self.given, **{k: v for k, v in self.a.items() if k in self.given}, **self.hyperparameters}

    def _widths(self, config_at: Path) -> dict[str, mup.Width]:
        """What muP makes of every parameter.

        Raises:
            EspalierError: when the base is another model, or the optimizer one of which it is not known how its steps go by the width.
        """
        scales_as = getattr(self.optimizer_method, "scales_as", None)
        if scales_as is None or self.method.name != "full":
            one = f"the optimizer {self.optimizer_method.name}" if scales_as is None else f"the method {self.method.name}"
            raise EspalierError(f"--mup: how the steps of {one} go by the width is not known; use adamw, adabelief, lion or perpgrad on all parameters")
        base = Path(self.a["mup"])
        narrow = _config(base)
        found = mup.widths(empty_of(self.config, config_at), empty_of(narrow, base))
        rates = sorted({getattr(width, scales_as) for width in found.values()})
        self.display.note(
            f"muP over a base of width {narrow.get_text_config().hidden_size}, here {self.config.get_text_config().hidden_size}: learning rates times "
            f"{', '.join(f'{rate:.4g}' for rate in rates)}" + ("" if self.directory is None else "; the weights of --model stay as they are")
        )
        return found

    def _rates_of_parameters(self, parameters: dict[str, torch.nn.Parameter]) -> dict[str, dict[str, float]]:
        """The optimizer's options by the width, by parameter name."""
        if self.widths is None:
            return {}
        of = {id(p): self.widths[name] for name, slot in self.attachment.slots.items() for p in slot.parameters()}
        rule = self.optimizer_method
        return {name: mup.options(of[id(p)], rule.weight_decay, rule.scales_as, p.ndim >= 2) for name, p in parameters.items()}

    def _take_advice(self, config_at: Path) -> None:
        """The learning rate of the Step Law, and what it says of the batch."""
        a, tokens = self.a, self.a["steps"] * self.a["batch_size"] * self.a["sequence_length"]
        blocks = sum(math.prod(t.shape) for t in parameters(empty_of(self.config, config_at)) if BLOCK.search(t.name))
        advice = step_law(blocks, tokens)
        a["learning_rate"] = advice.learning_rate
        outside = "" if advice.is_fitted else "; the law was fitted for 60 M to 2.2 B parameters and 2 to 100 B tokens, so this is a guess"
        batch = f"the batch has {a['batch_size'] * a['sequence_length']:,} tokens, and the law would have {advice.batch_tokens:,}"
        self.display.note(f"learning rate {advice.learning_rate:.3g} by the Step Law ({blocks:,} parameters in the blocks, {tokens:,} tokens); {batch}{outside}")

    def _below(self, folder: Path) -> delta_store.Delta:
        """A delta that the new one is trained over.

        Raises:
            EspalierError: when it holds branches, brings a head or tokens, or the method looks at what the base alone does.
        """
        if "branches" in delta_store.manifest_of(folder):
            raise EspalierError(f"--over {folder}: this delta holds branches; a new one can be trained over updates of weights only")
        delta = delta_store.load(folder, mapped=True)
        if brings := next((what for key, what in (("classifier", "a head"), ("vocabulary", "tokens")) if key in delta.manifest), None):
            raise EspalierError(f"--over {folder}: this delta brings {brings} that the base does not have; apply it, and tune the model that comes of it")
        if self.method.wanted() is not None:
            raise EspalierError(f"--over {folder}: {self.method.name} starts from statistics of the base, not of the deltas on it; apply them first")
        return delta

    def _take_tasks(self) -> None:
        """The tasks of a method that tells them apart: those of the data, where it was not given any; all data must be of them.

        Raises:
            EspalierError: naming the data, when they are of other tasks or of none.
        """
        if not self.method.task_names() and self.store.tasks:
            if odd := next((name for name in self.store.tasks if "," in name), None):
                raise EspalierError(f"--data {self.a['data']} has a task {odd!r}; the name of a task must have no comma")
            self.hyperparameters[self.spelt["method", "tasks"]] = ",".join(self.store.tasks)
            own = {key: self.hyperparameters[spelt] for (part, key), spelt in self.spelt.items() if part == "method"}
            self.method = registry.make(self.method.name, registry.ATTACHED, **own)
        known = list(self.method.task_names())
        for name, store in {self.a["data"]: self.store, **self.eval_stores}.items():
            if len(known) > 1 and not store.tasks:
                raise EspalierError(f"the records of {name} name no task; they must be of {', '.join(known)}")
            if strange := next((task for task in store.tasks if task not in known), None):
                raise EspalierError(f"{name} has the task {strange!r}; known are: {', '.join(known) or 'none, for the training data have none'}")

    def _choose_task(self) -> None:
        """Labels are classified, and the head that does it trains whole; anything else is text."""
        self.task: Task = Language(self.encoder)
        self.new_head: list[str] = []
        for name, store in {self.a["data"]: self.store, **self.eval_stores}.items():
            if (store.kind == "label") != (self.store.kind == "label"):
                raise EspalierError(f"--data {self.a['data']} and --eval-data {name}: either both have labels or neither has")
        if self.store.kind != "label":
            return
        if self.directory is None or self.verb != "tune":
            raise EspalierError(f"--data {self.a['data']} has labels, which {self.verb} does not learn; use espalier tune, or give text")
        self.config, is_new = new_classifier(self.config, self.store, self.encoder, self.display)
        self.task = Classification(self.encoder, labels_of(self.config), self.config.pad_token_id)
        for store in self.eval_stores.values():
            self.task.order(store, self.a["sequence_length"])
        head = [t.name for t in parameters(empty_of(self.config, self.directory.path)) if t.role.startswith("head")]
        self.full += head
        self.new_head = [name for name in head if "pooler" not in name] if is_new else []

    def _fit_method(self, numbers: int, config_at: Path) -> None:
        """Make the method as large as ``--trainable`` allows."""
        size = self.spelt.get(("method", self.method.size), "")
        if size in self.given:
            raise EspalierError(f"give --{size.replace('_', '-')} or --trainable, not both")
        targets = targets_of(empty_model(config_at), self.method, self.a["targets"])
        self.method = fit(self.method, targets, numbers)
        value, count = getattr(self.method, self.method.size), trained(self.method, targets)
        self.hyperparameters[size] = value
        self.display.note(f"--trainable {self.a['trainable']}: {self.method.size} {value} trains {count:,} numbers")

    def _open(self, data: str) -> TokenStore:
        source = open_source(data)
        self.display.note(f"reading {source.name}: {len(source.files)} file{'s' * (len(source.files) > 1)} of {source.kind}")
        return open_store(source, self.encoder, by_task=self.method.by_task)

    # -- memory

    def make_plan(self) -> None:
        """Choose how steps are cut; refuses a budget that is too small before the model is loaded."""
        a = self.a
        self.dtype = torch_dtype(a["dtype"], self.directory)
        a["dtype"] = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        folder = self.out / "run"
        if a["resume"] and (folder / "run.json").exists():
            resolved = read_json(folder / "run.json")["resolved"]
            for key in ("micro_batch_size", "recompute", "logits_chunk"):
                a[key] = resolved[key]
        options = {"targets": a["targets"], "full": self.full, "new_tokens": self.new_tokens, "dropout": a["dropout"], "seed": a["seed"]}

        @functools.cache
        def traced(micro: int, recompute: bool, chunk: int) -> Traced:
            return trace_step(
                self.config, self.method, options, dtype=self.dtype, tokens=micro,
                sequence_length=a["sequence_length"], recompute=recompute, chunk=chunk, base_bits=a["base_bits"],
                gradients=self.gradients, over=[dict(delta.updates) for delta in self.over], steps=a["steps"],
            )  # fmt: skip

        def price(micro: int, recompute: bool, chunk: int) -> planning.Phases:
            step = traced(micro, recompute, chunk)
            if micro >= a["batch_size"] * a["sequence_length"]:
                return planning.predict(around, step, step.held, recompute, self.device.type == "cpu")
            held = step.accumulated
            if self.gradients == "few":
                held = dataclasses.replace(held, gradients=held.gradients + self.optimizer_method.summed_bytes(step.moving))
            return planning.predict(around, step, held, recompute, self.device.type == "cpu")

        chunk = planning.default_chunk(self.config.vocab_size)
        choices = list(planning.candidates(a["batch_size"] * a["sequence_length"], a["sequence_length"], chunk, a))
        self.request = self._request()
        first = traced(*choices[0])  # which imports what the model needs
        self.optimizer_method.check_shapes(first.shapes)
        self.traced = first
        baseline, looking, starting = resident_memory(), 0, 0
        if self.request is not None:
            sequence = traced(a["sequence_length"], True, a["sequence_length"]).peak
            looking, starting = self._statistics_bytes(self.request, round((1 + 2 * planning.SPREAD) * sequence))
        compiles = self.device.type == "cpu" and first.trained >= 1 << 16 and (a["state"] != "fp32" or self.gradients == "none")
        around = planning.Around(
            baseline, *self._load_bytes(first), starting, looking,
            state=self.optimizer_method.state_bytes(first.moving if self.method.state_policy != "keep" else first.shapes),
            updating=self.optimizer_method.step_bytes(first.moving), exported=first.exported, moves_early=self.gradients == "few",
            compiled=planning.COMPILED if compiles else 0,
        )  # fmt: skip
        bound = self.budget or (1 << 62 if self.verb == "plan" else round(0.8 * planning.available_memory(self.device)))
        what = f"--budget {format_bytes(bound)}" if self.budget else f"80 % of the free memory ({format_bytes(bound)})"
        self.plan = planning.choose(bound, what, choices, baseline, price)
        if self.verb == "plan":
            self.least = planning.leanest(choices[-1:], baseline, price)
        a["micro_batch_size"] = self.plan.micro_tokens // a["sequence_length"]
        a["recompute"], a["logits_chunk"] = self.plan.recompute, self.plan.logits_chunk
        if self.verb != "plan":
            self._say_plan()

    def _load_bytes(self, traced: Traced) -> tuple[int, int]:
        """What loading needs beside the frozen model: values that training replaces, and pages of a file that is converted."""
        size = torch.empty(0, dtype=self.dtype).element_size()
        whole, converted = 0, 0
        if self.directory is None:  # a new model begins in float32
            whole, converted = size * self._random_numbers, max(0, 4 - size) * self._random_numbers
        if self.directory:
            whole = sum(math.prod(self.directory.info(n).shape) for n in self.directory) * size
            converted = sum(i.nbytes for n in self.directory if (i := self.directory.info(n)).dtype != dtype_name(self.dtype))
        # pages of a mapped file are dropped together, when all that is to be coded is
        return whole if self.a["base_bits"] and self.device.type == "cpu" else max(0, whole - traced.model), converted

    @functools.cached_property
    def _random_numbers(self) -> int:
        """How many numbers a new model has, all of which are drawn before the method puts others in their place."""
        return sum(p.numel() for p in empty_of(self.config, Path(self.a["architecture"])).parameters())

    def _statistics_bytes(self, request: Request, sequence: int) -> tuple[int, int]:
        """What looking at the data takes where that was not done before, given what one sequence's passes take; and what the
        method's start takes, which reads the statistics of one parameter at a time and works on copies of them."""
        assert self.directory is not None
        targets = parameters(empty_model(self.directory.path))
        chosen = select(targets, request.targets)
        experts = getattr(self.config, "num_experts_per_tok", None) or 1
        looking = 0 if find_calibration(request) else footprint(targets, chosen, request, self.dtype.itemsize, experts) + sequence
        return looking, 3 * largest_statistic(chosen, request)

    def _say_plan(self) -> None:
        p, a = self.plan, self.a
        micro = f"micro-batches of {p.micro_tokens:,} tokens, {'recomputing' if p.recompute else 'keeping'} activations"
        limit = f" of the {format_bytes(self.budget)} allowed" if self.budget else ""
        steps = f"{a['steps']:,} steps" if a["steps"] else "steps"
        self.display.note(
            f"plan: {steps} of {a['batch_size'] * a['sequence_length']:,} tokens in {micro}, logits of "
            f"{p.logits_chunk} tokens at a time; predicted peak {format_bytes(p.predicted_peak)}{limit}"
        )
        kinds = ", ".join(f"{name} {format_bytes(n)}" for name, n in p.phases[p.worst].items() if n)
        self.display.note(f"      ({p.worst}: {kinds})")

    def prediction(self) -> dict[str, Any]:
        """The plan as ``espalier plan`` gives it."""
        state, size = self.optimizer_method.state_bytes(self.traced.shapes), 4 * self.traced.trained
        return {
            "model": self.a["model"] or self.a["architecture"], "method": self.method.name, "optimizer": self.a["optimizer"], "state": self.a["state"],
            "dtype": self.a["dtype"], "trained": self.traced.trained, "batch_tokens": self.a["batch_size"] * self.a["sequence_length"],
            "budget": self.budget, "needs": self.plan.needs, "least": self.least.needs, **self.plan.as_json(), "worst": self.plan.worst,
            "peaks": {phase: sum(kinds.values()) for phase, kinds in self.plan.phases.items()}, "checkpoint_bytes": size + state,
        }  # fmt: skip

    # -- model

    def load_model(self) -> None:
        """The model, with base values only where training needs them; what the method wants to know of the data first.

        One block of the model is in memory while the data are looked at, so that this is done before all of it is there.
        """
        self.statistics = self._statistics()
        release_free_memory()
        if self.directory is not None and self.store.kind == "label":
            self.model: PreTrainedModel = self._load_classifier(self.directory)
        elif self.directory is not None:
            self.model = load_model(self.directory.path, self.dtype, str(self.device))
        else:
            import transformers

            transformers.utils.logging.disable_progress_bar()
            torch.manual_seed(self.a["seed"])
            self.model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
            if self.widths is not None:
                mup.start(self.model, self.widths)
            torch.nn.Module.to(self.model, self.device, self.dtype)
        grow(self.model, self.config.vocab_size)
        if self.a["base_bits"] is not None:
            quantize_base(self.model, self.a["base_bits"])
        for delta in self.over:
            assert delta.folder is not None and self.directory is not None
            put_on(self.model, delta.folder, self.directory)
            session.check_tokenizer(delta.manifest, str(delta.folder), self.encoder, self.store.kind, self.display)
        self.padded = self.task.must_pad(self.model, self.display)

    def _load_classifier(self, directory: ModelDirectory) -> PreTrainedModel:
        as_stored = copy.deepcopy(self.config)
        as_stored.vocab_size = _config(directory.path).vocab_size
        model, missing = load_as(directory.path, as_stored, self.dtype, str(self.device), new=self.new_head, seed=self.a["seed"])
        if lost := sorted(set(missing) - set(self.full)):
            raise EspalierError(f"{directory.path} lacks {lost[0]!r} ({len(lost)} tensors in all), which {type(model).__name__} needs")
        return model

    def attach(self) -> None:
        """The method's updates; says what trains, and shows what is learnt of the data."""
        a = self.a
        record = session.Record(self.verb, self.given, self._resolved(), self._facts())
        self.run, self.record = session.open_run(self.out, record, a["resume"], self._defaults())
        attach(
            self.model, self.method, targets=a["targets"], full=self.full, new_tokens=self.new_tokens, seed=a["seed"], dropout=a["dropout"],
            statistics=self.statistics,
        )  # fmt: skip
        *_, self.attachment = attachments(self.model).values()
        release_base(self.model)
        session.show_targets(self.attachment, self.model, self.display)
        anew = [t for t in self.attachment.targets if self.directory and math.isinf(self.method.start_bound(t))]  # type: ignore[union-attr]
        if anew:
            self.display.note(f"{self.method.name} puts other numbers in the place of {anew[0].name} ({len(anew)} such): the start is not the model given")
        session.show_masks(self.store, self.tokenizer, self.display)

    def _statistics(self) -> Statistics | None:
        """The statistics of the training data that the method starts from, taken from the cache where they were made before."""
        if self.request is None or self.directory is None:
            return None
        found, _ = make_calibration(
            self.directory, self.store, self.request, dtype=self.dtype, device=self.device,
            bar=lambda total: self.display.bar("looking at the data", total, "sequences"), note=self.display.note,
        )  # fmt: skip
        return found.read

    def _request(self) -> Request | None:
        """What the method wants to know of the data, if anything.

        Raises:
            EspalierError: when there is no trained model whose statistics these could be.
        """
        a, wanted = self.a, self.method.wanted()
        if wanted is None:
            return None
        if self.directory is None:
            raise EspalierError(f"{self.method.name} starts from statistics of the data in a trained model; give --model")
        return Request.of(
            model=self.directory.fingerprint(), data=self.store.digest if self.a["data"] else "", want=parse_want(wanted.statistics), targets=wanted.targets or a["targets"],
            tokens=wanted.tokens, dtype=self.dtype, rank=wanted.rank, seed=a["seed"], sequence_length=a["sequence_length"],
        )  # fmt: skip

    def _facts(self) -> dict[str, Any]:
        return {
            "base_fingerprint": self.directory.fingerprint() if self.directory else None,
            "data": self.store.digest,
            "tokenizer": self.encoder.fingerprint,
            **({"over": [delta.manifest["sha256"] for delta in self.over]} if self.over else {}),
        }

    # -- work

    def measure(self, when: str) -> None:
        """Score every held-out data set."""
        with training_form(self.model, chunk=self.a["logits_chunk"], recompute=False, padded=self.padded):
            for name, held_out in self.eval_stores.items():
                self.evaluations.setdefault(name, {})[when] = self._score(name, held_out, when)

    def _score(self, name: str, held_out: TokenStore, when: str) -> dict[str, Any]:
        with self.display.bar(f"measuring {name}", self.task.size(held_out), self.task.unit) as update:
            found = self.task.score(self.model, held_out, self.a["sequence_length"], self.plan.micro_tokens, self.padded, update)
        self.display.note(f"{name} {when}: {self.task.in_words(found)}")
        return found.as_json()

    def train(self) -> None:
        """The loop, from the last checkpoint when resuming."""
        a = self.a
        settings = Settings(
            **_rates(a), batch_tokens=a["batch_size"] * a["sequence_length"], micro_tokens=self.plan.micro_tokens, clip=a["clip"], label_smoothing=a["label_smoothing"],
            loss=a["loss"], reweight=a["reweight"], reweight_temperature=a["reweight_temperature"], checkpoint_every=a["checkpoint_every"],
            keep_checkpoints=a["keep_checkpoints"], evaluate_every=a["eval_every"],
            padded=self.padded, pad_token=self.task.pad_token, in_backward=a["update_in_backward"],
            resident_between=self.plan.resident_between if self.budget else 0,
        )  # fmt: skip
        parameters = trainable_parameters(self.model)
        course = Course(self.model, a["steps"])
        optimizer = build(self.optimizer_method.build, parameters, a["learning_rate"], {**self._rates_of_parameters(parameters), **course.optimizer_options()})
        tensors = {**parameters, **course.kept()}
        state = self.optimizer_method.state_bytes({name: tuple(p.shape) for name, p in parameters.items()})
        torch.manual_seed(a["seed"])  # whatever planning and loading drew: the first checkpoint holds the random state
        if self.fork is not None:
            self.run.state = self.fork.load(tensors, optimizer, self.record.facts["data"] == self.fork.record.facts["data"], self.display)
        kept = checkpoint.at_once(a["steps"], a["checkpoint_every"], a["keep_checkpoints"])
        session.dry_run(self.out, self.run, tensors, optimizer, self._write_delta, state, kept)
        session.resume_from_last(self.run, tensors, optimizer, self.display)

        def on_evaluate(step: int) -> dict[str, Any]:
            when = f"after step {step}"
            return {"evaluation": {name: self._score(name, held_out, when) for name, held_out in self.eval_stores.items()}}

        form = training_form(self.model, chunk=a["logits_chunk"], recompute=bool(a["recompute"]), padded=self.padded)
        with form:
            on = on_evaluate if self.eval_stores and a["eval_every"] else None
            self.steps = session.run_loop(self.model, parameters, optimizer, self.order, settings, course, self.run, self.display, on)
        self.found = course.report()
        self.model.eval()
        del optimizer

    # -- results

    def _write_delta(self, folder: Path) -> dict[str, Any]:
        a = self.a
        base = {
            "name": str(a["model"]) if a["model"] else None,
            "fingerprint": self.record.facts["base_fingerprint"],
            "model_type": self.config.model_type,
        }
        keys = ("data", "batch_size", "sequence_length", "learning_rate", "schedule", "seed", *(k for k in ("label_smoothing", "base_bits", "reweight") if a[k]), *(["loss"] if a["loss"] != "cross_entropy" else []))
        training = {"steps": self.run.state.step, "tokens": self.run.state.tokens, **{key: a[key] for key in keys}}
        manifest = saving.describe(self.attachment, base, self.encoder, MASK_POLICY[self.store.kind], training)
        return saving.write(self.model, self.attachment, manifest, folder, self.directory, self.tokenizer)

    def save_delta(self, out: Path) -> None:
        """The delta, and PEFT's files beside it where it is plain LoRA."""
        written = self._write_delta(out)
        self.size = written["bytes"]
        self.display.note(f"the delta is in {out} ({format_bytes(self.size)})")
        if written["peft"]:
            otherwise = "" if self.attachment.branches else "; `espalier apply` makes a model of it"
            self.display.note(f"PEFT cannot load it as it is: {written['peft']}{otherwise}")

    def save_model(self, out: Path) -> None:
        """The trained model as an ordinary checkpoint."""
        settle(self.model)
        temporary = self.run.folder / "model"
        shutil.rmtree(temporary, ignore_errors=True)
        self.model.save_pretrained(temporary)
        self.tokenizer.save_pretrained(temporary)
        for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
            file.replace(out / file.name)
        temporary.rmdir()
        self.size = sum(f.stat().st_size for f in out.iterdir() if f.is_file())
        self.display.note(f"the model is in {out} ({format_bytes(self.size)})")

    def report(self) -> dict[str, Any]:
        """The result, also written to ``run/result.json``."""
        state, peak = self.run.state, peak_memory()
        lines = [json.loads(line) for line in self.run.metrics.read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        tail = losses[-max(1, len(losses) // 10) :]
        result = {
            "out": str(self.out), "bytes": self.size, "method": self.method.name, "trained": self.attachment.trainable(),
            "steps": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 3),
            "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1),
            "first_loss": losses[0] if losses else None, "final_loss": sum(tail) / len(tail) if tail else None,
            "peak_memory": peak, "predicted_peak": self.plan.predicted_peak, "import_baseline": self.plan.baseline, "budget": self.budget,
            "evaluation": self.evaluations, "plan": self.plan.as_json(), **({"course": self.found} if self.found else {}),
        }  # fmt: skip
        write_text(self.out / "run" / "result.json", json.dumps(result, indent=1) + "\n")
        baseline = self.plan.baseline
        net, predicted = peak - baseline, self.plan.predicted_peak - baseline
        self.display.note(
            f"peak memory {format_bytes(peak)}, predicted {format_bytes(self.plan.predicted_peak)}; without the {format_bytes(baseline)} of imports "
            f"{format_bytes(net)}, predicted {format_bytes(predicted)} ({net / predicted:.0%} of it); {result['tokens_per_second']:,.0f} tokens/s"
        )
        return result


def _rates(a: dict[str, Any]) -> dict[str, Any]:
    """What of the loop's settings makes the learning rate of a step, from a run's arguments."""
    leaves = knee(a["learning_rate"], a["batch_size"]) / (a["batch_size"] * a["sequence_length"]) if a["schedule"] == "power" else None
    return {
        "steps": a["steps"], "learning_rate": a["learning_rate"], "schedule": a["schedule"], "warmup": round(a["warmup"] * a["steps"]),
        "floor": a["floor"], "decay": a["cooldown"], "knee": leaves,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """What records can hold: a path as a string, a tuple as a list, anything else as it is."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _rate(given: Any) -> Any:
    """A learning rate as a number; ``None`` and auto stay as they are.

    Raises:
        EspalierError: for anything else.
    """
    if given is None or given == "auto":
        return given
    try:
        return float(given)
    except (TypeError, ValueError):
        raise EspalierError(f"learning_rate is {given!r}; it must be a number, or auto") from None


def _add_tokens(tokenizer: Any, given: str) -> list[int]:
    """Give a tokenizer the tokens of a file (one a line) or of a list with commas; their ids.

    Raises:
        EspalierError: when there is none, or one twice, or the tokenizer has it already.
    """
    from transformers import AddedToken

    try:
        tokens = Path(given).read_text(encoding="utf-8").splitlines() if Path(given).is_file() else given.split(",")
    except UnicodeDecodeError as error:
        raise EspalierError(f"--add-tokens {given} is not UTF-8 text; give a file of one token a line") from error
    tokens = [token for token in tokens if token.strip()]
    known = tokenizer.get_vocab()
    wrong = next((token for number, token in enumerate(tokens) if token in known or token in tokens[:number]), None)
    if not tokens or wrong is not None:
        why = f"names {wrong!r}, which the tokenizer has already" if wrong in known else f"names {wrong!r} twice" if tokens else "names no token"
        raise EspalierError(f"--add-tokens {given} {why}; give new tokens, as a,b,c or as a file of one a line")
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    return tokenizer.convert_tokens_to_ids(tokens)


def _config(path: Path) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except MALFORMED as error:
        raise EspalierError(f"transformers cannot read the config of {path}: {error}") from error
