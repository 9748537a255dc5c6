"""What every training verb does around the loop: the run's folder, resuming, the dry run, what is shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

from espalier.attach.attachment import Attachment
from espalier.attach.coded import CodedWeight
from espalier.attach.course import Course
from espalier.checkpoint.atomic import require_free_space, write_text
from espalier.checkpoint.directory import read_json
from espalier.data.encode import MASK_POLICY, Encoder
from espalier.data.store import TokenStore
from espalier.delta import store as delta_store
from espalier.display import Display
from espalier.errors import EspalierError, at_least
from espalier.memory import language_loss, packed_attention
from espalier.memory.meter import format_bytes
from espalier.train import checkpoint
from espalier.train.loop import Hooks, Order, Run, Settings, Step, train

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass
class Record:
    """``run/run.json``: the arguments as given and as resolved, and what the run stands on."""

    verb: str
    arguments: dict[str, Any]
    resolved: dict[str, Any]
    facts: dict[str, Any]


def read_record(path: Path, defaults: Mapping[str, Any] = NONE) -> Record:
    """The record of a run.

    Args:
        defaults: of the options that there are now; a run that knew one of them not yet had that.

    Raises:
        EspalierError: when the file is none.
    """
    try:
        found = Record(**read_json(path))
        found.arguments, found.resolved = {**defaults, **found.arguments}, {**defaults, **found.resolved}
        return found
    except TypeError as error:
        raise EspalierError(f"{path} is not the record of a run ({error})") from error


_PRESENTATION = ("resume", "quiet", "out")


def earlier_run(out: Path, verb: str, arguments: Mapping[str, Any], resume: bool, defaults: Mapping[str, Any] = NONE) -> Record | None:
    """The record of the run that ``out`` holds, or ``None`` where there is none yet.

    Args:
        defaults: as :func:`read_record` takes them.

    Raises:
        EspalierError: when ``out`` already holds something and ``resume`` was not asked for, or when it holds
            a run of another verb or of other arguments.
    """
    folder = out / "run"
    path = folder / "run.json"
    if not path.exists():
        # a run folder without its record is what a kill in the first moments leaves
        if out.exists() and (not out.is_dir() or any(entry != folder for entry in out.iterdir())):
            raise EspalierError(f"--out {out} is not empty and holds no run; give a directory that does not exist yet")
        return None
    if not resume:
        raise EspalierError(f"--out {out} already holds a run; pass --resume to go on with it, or give another --out")
    before = read_record(path, defaults)
    if before.verb != verb:
        raise EspalierError(f"{out} holds a run of {before.verb!r}, not of {verb!r}")
    for key in sorted(arguments.keys() | before.arguments.keys()):
        now, then, made = arguments.get(key), before.arguments.get(key), before.resolved.get(key)
        if key not in _PRESENTATION and now != then and now != made:
            raise EspalierError(
                f"--resume: {key} is {now!r}, the run in {out} was started with {then!r}; repeat its command, or start anew "
                "in another --out"
            )
    return before


def open_run(out: Path, record: Record, resume: bool, defaults: Mapping[str, Any] = NONE) -> tuple[Run, Record]:
    """The run's folder ``OUT/run``, new or to be resumed; returns the record that holds.

    Raises:
        EspalierError: what :func:`earlier_run` raises, or when the run that is there stands on another base or other data.
    """
    folder = out / "run"
    before = earlier_run(out, record.verb, record.arguments, resume, defaults)
    if before is None:
        folder.mkdir(parents=True, exist_ok=True)
        _write_recipe(folder, record)
        write_text(folder / "run.json", json.dumps(record.__dict__, indent=1) + "\n")
        return Run(folder), record
    for key, value in record.facts.items():
        if before.facts.get(key) != value:
            raise EspalierError(
                f"--resume: the {key.replace('_', ' ')} changed since the run in {out} began: it was {before.facts.get(key)}, "
                f"it is {value}"
            )
    return Run(folder), before


def _write_recipe(folder: Path, record: Record) -> None:
    from espalier import __version__

    header = f"# espalier {record.verb} --config THIS_FILE --out DIR reruns this run (espalier {__version__}, torch {torch.__version__})\n"
    # epochs are steps by now, and what trains so much is the method's own option
    left_out = (*_PRESENTATION, "epochs", "trainable")
    content = {key: value for key, value in record.resolved.items() if value is not None and key not in left_out}
    write_text(folder / "recipe.yaml", header + yaml.safe_dump(content, sort_keys=False))


def seed_everything(seed: int, threads: int | None) -> None:
    """Set torch's generator and thread count.

    Raises:
        EspalierError: for a seed or a number of threads that torch cannot take.
    """
    if not -(2**63) <= seed < 2**64:
        raise EspalierError(f"seed is {seed}; it must fit into 64 bits")
    if threads is not None:
        at_least("threads", threads, 1)
        torch.set_num_threads(threads)
    torch.manual_seed(seed)


def must_pad(model: PreTrainedModel, vocabulary: int, display: Display) -> bool:
    """Whether this family cannot be packed; says so.

    Raises:
        EspalierError: when its logits cannot be computed from its final hidden states.
    """
    was_training = model.training
    model.eval()
    try:
        if not language_loss.matches_logits(model, vocabulary):
            raise EspalierError(f"{type(model).__name__} makes its logits in a way that this version does not know")
        if packed_attention.packs(model, vocabulary):
            return False
    finally:
        model.train(was_training)
    display.warn(f"{type(model).__name__} gives packed sequences other logits than separate ones: padding instead of packing")
    return True


DEFAULT_LENGTH = 512


def fitting_length(asked: int | None, config: Any, taken: int = 0) -> int:
    """The sequence length to use: the one asked for, or the default, cut to the positions that the model has.

    Args:
        taken: positions in front of every sequence that a branch takes.

    Raises:
        EspalierError: when more positions are asked for than the model has.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest and longest <= taken:
        raise EspalierError(f"the branch takes {taken} positions; the model has {longest}")
    if asked is None:
        return min(DEFAULT_LENGTH, longest - taken if longest else DEFAULT_LENGTH)
    if longest and asked > longest - taken:
        beside = f", of which the branch takes {taken}" if taken else ""
        raise EspalierError(f"sequence_length is {asked}; the model has {longest} positions{beside}")
    return asked


def pad_token(tokenizer: Any) -> int:
    """The id that fills rows: the tokenizer's padding token, or any."""
    return tokenizer.pad_token_id or tokenizer.eos_token_id or 0


def check_tokenizer(manifest: Mapping[str, Any], folder: str, encoder: Encoder, kind: str, display: Display) -> None:
    """Compare the tokenizer, template and mask policy that a delta was trained with to those in use.

    Raises:
        EspalierError: when the tokenizer or, for chats, the template is another one.
    """
    trained_with = manifest.get("tokenizer")
    if trained_with and trained_with != encoder.fingerprint:
        raise EspalierError(
            f"the delta in {folder} was trained with another tokenizer ({trained_with}); the model's is {encoder.fingerprint}"
        )
    template = manifest.get("chat_template")
    if kind == "chat" and template and template != encoder.template_fingerprint:
        raise EspalierError(
            f"the delta in {folder} was trained with another chat template ({template}); the model's is "
            f"{encoder.template_fingerprint}"
        )
    policy = manifest.get("mask_policy")
    if policy and policy != MASK_POLICY[kind]:
        display.note(f"the delta in {folder} learnt from {policy}; here it is used on {MASK_POLICY[kind]}")


def show_targets(attachment: Attachment, model: nn.Module, display: Display) -> None:
    """The table of what trains, per layer, before the first step."""
    groups: dict[tuple[str, tuple[int, ...], int], list[int | None]] = {}
    for slot in attachment.slots.values():
        trained = sum(p.numel() for p in slot.parameters() if p.requires_grad)
        role = " = ".join(dict.fromkeys(slot.target.roles))
        groups.setdefault((role, slot.target.shape, trained), []).append(slot.target.block)
    for branch in attachment.branches.values():
        trained = sum(p.numel() for p in branch.parameters() if p.requires_grad)
        groups.setdefault((branch.site.kind, (branch.site.width,), trained), []).append(branch.site.block)
    rows = []
    for (role, shape, trained), blocks in groups.items():
        rows.append([role, _ranges(blocks), " x ".join(map(str, shape)), trained, trained * len(blocks)])
    if attachment.pool is not None:
        shared = sum(p.numel() for p in attachment.pool.parameters() if p.requires_grad)
        rows.append(["shared by all", "-", "", shared, shared])
    display.table(f"{attachment.method.name}: what trains", ("role", "layers", "shape", "each", "trained"), rows)
    trained = attachment.trainable()
    frozen = sum(p.numel() for name, p in model.named_parameters() if not (p.requires_grad or p.is_meta or ".espalier_base." in name))
    frozen += sum(module.shape.numel() for module in model.modules() if isinstance(module, CodedWeight))
    display.note(f"{trained:,} numbers train, {frozen:,} are frozen ({trained / (trained + frozen):.2%} train)")


def _ranges(blocks: list[int | None]) -> str:
    numbers = sorted(b for b in blocks if b is not None)
    if not numbers:
        return "-"
    runs: list[list[int]] = [[numbers[0], numbers[0]]]
    for number in numbers[1:]:
        if number <= runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def show_masks(store: TokenStore, tokenizer: Any, display: Display, tokens: int = 160) -> None:
    """A sample of the first document with its targets coloured, where not all tokens are targets."""
    end = int(store.offsets[1])
    flags = store.read_targets(0, end)
    if flags is None:
        return
    begin = max(0, min(int(flags.argmax()) - tokens // 2, end - tokens))  # around the first target
    count = min(tokens, end - begin)
    ids, flags = store.read(begin, begin + count), flags[begin : begin + count]
    spans: list[tuple[str, bool]] = []
    start = 0
    for position in range(1, count + 1):
        if position == count or flags[position] != flags[start]:
            spans.append((tokenizer.decode(ids[start:position].tolist()), bool(flags[start])))
            start = position
    display.spans("the first example; only the marked text is learnt:", spans)


def dry_run(
    out: Path, run: Run, tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer,
    save: Callable[[Path], Any], state_bytes: int, kept: int = checkpoint.KEPT,
) -> None:  # fmt: skip
    """Before the first step: save what will be saved, read it back, and ask the disk for the whole run.

    Args:
        kept: how many checkpoints there will be at once.

    Raises:
        EspalierError: when the disk lacks space for the end of the run, or saving does not work.
    """
    trained = sum(t.numel() * t.element_size() for t in tensors.values())
    needed = (kept + 1) * (trained + state_bytes) + 2 * trained + (16 << 20)
    require_free_space(out, needed, f"this run (checkpoints of {format_bytes(trained + state_bytes)} and its result)")
    if checkpoint.steps(run.checkpoints):
        return
    trial = run.folder / "trial"
    shutil.rmtree(trial, ignore_errors=True)
    save(trial)
    delta_store.load(trial, branches=True, bank=True)
    shutil.rmtree(trial)
    path = checkpoint.save(run.checkpoints, tensors, optimizer, run.state)
    checkpoint.check(path)


def resume_from_last(
    run: Run, tensors: Mapping[str, torch.Tensor], optimizer: torch.optim.Optimizer, display: Display
) -> None:
    """Continue from the newest checkpoint, if there is one.

    Raises:
        EspalierError: when it is damaged.
    """
    checkpoint.sweep(run.checkpoints)
    if not (found := checkpoint.steps(run.checkpoints)):
        return
    run.state, differences = checkpoint.load(found[-1], tensors, optimizer)
    for key, (then, now) in differences.items():
        display.warn(f"{key} was {then} and is {now}: the result will not be bit-identical to an uninterrupted run's")
    run.forget_after(run.state.step)
    if run.state.step:
        display.note(f"resuming after step {run.state.step}")


def run_loop(
    model: nn.Module, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, order: Order,
    settings: Settings, course: Course, run: Run, display: Display, on_evaluate: Callable[[int], dict[str, Any]] | None,
) -> list[Step]:  # fmt: skip
    """The loop with a progress bar; returns the steps done now."""
    done: list[Step] = []
    with display.bar("training", settings.steps, "steps") as update:

        def on_step(step: Step) -> None:
            done.append(step)
            recent = done[-20:]
            speed = sum(s.tokens for s in recent) / sum(s.seconds for s in recent)
            update(
                step.step,
                loss=f"{step.loss:.3f}",
                **{"tokens/s": f"{speed:,.0f}", "memory": format_bytes(step.memory)},
            )

        update(run.state.step)
        train(model, parameters, optimizer, order, settings, course, run, Hooks(on_step=on_step, on_evaluate=on_evaluate))
    return done
