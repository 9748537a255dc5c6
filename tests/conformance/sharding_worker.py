"""One of two processes that train a sharded model; reports how it differs from one process that does it all."""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


PLAIN = {"options": {}, "optimizer": "sgd", "steps": 2, "rate": 0.1, "cuts": 1, "seed": 3}
"""A short course; ``cuts``: into how many micro-batches one process cuts what two have one of each."""


def run(method: str, family: str, targets: str | None, bits: int | None, course: dict[str, Any] | None, out: Path, rank: int) -> dict[str, float]:
    """A course in both ways; the largest differences of the losses and of the saved and kept tensors, and what became of the optimizer's state."""
    from families import fit_for, statistics_of, tiny

    from espalier import registry
    from espalier.attach.attachment import attach, trainable_parameters
    from espalier.attach.coded_base import quantize_base
    from espalier.attach.course import Course
    from espalier.checkpoint.safetensors_file import read_safetensors
    from espalier.exchange.save import save
    from espalier.memory.joined_optimizer import build

    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 64, (4, 9), generator=generator)
    given = PLAIN | (course or {})

    def steps(model: torch.nn.Module, mine: torch.Tensor, cuts: int) -> tuple[list[float], dict[str, torch.Tensor], int]:
        """The losses, the tensors that checkpoints keep, and how many of these are others than at the start."""
        course = Course(model, given["steps"])
        optimizer = build(makers[given["optimizer"]], trainable_parameters(model), given["rate"], course.optimizer_options())
        start = {name: tensor.clone() for name, tensor in course.kept().items()}
        losses = []
        for step in range(given["steps"]):
            course.begin(step, given["rate"], optimizer, measure=lambda: float(model(mine, labels=mine).loss))
            loss = torch.zeros(())
            for micro in mine.chunk(cuts):
                part = model(micro, labels=micro).loss / cuts
                (part + course.penalty() / cuts).backward()
                loss += part.detach()
            course.before_step()
            if given.get("clip"):
                torch.nn.utils.clip_grad_norm_(trainable_parameters(model).values(), given["clip"])
            optimizer.step()
            course.after_step()
            optimizer.zero_grad()
            losses.append(float(loss))
        kept = course.kept()
        return losses, kept, sum(not torch.equal(tensor, start[name]) for name, tensor in kept.items())

    base = out.parent / f"base-{family}-{registry.find(method).settings.get('needs')}"
    whole, sharded = (fit_for(method, copy.deepcopy(tiny(family))).eval() for _ in range(2))
    if rank == 0 and not base.exists():
        whole.save_pretrained(base)
    distributed.barrier()
    for model in (whole, sharded) if bits else ():
        quantize_base(model, bits)
        if bits == 4:
            model.gradient_checkpointing_enable()
            model.train()
        for dropout in (m for m in model.modules() if isinstance(m, torch.nn.Dropout)):
            dropout.p = 0.0
    results, held = [], 0.0
    for model, mine in ((whole, x), (sharded, x[rank * 2 : rank * 2 + 2])):
        attach(model, method, targets=targets, seed=given["seed"], statistics=statistics_of(model), **given["options"])
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in trainable_parameters(model).values():
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
        if model is sharded:
            for block in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
                fully_shard(block)
            fully_shard(model)
            codes = [p for name, p in model.named_parameters() if ".espalier_base." in name]
            held = sum(p.to_local().numel() for p in codes) / max(1, sum(p.numel() for p in codes))
            happened.clear()
        found, kept, changed = steps(model, mine, 2 if bits else given["cuts"] if model is whole else 1)
        losses = torch.tensor(found)
        if model is sharded:
            distributed.all_reduce(losses)
            losses /= 2
        saved = out / ("sharded" if model is sharded else f"whole{rank}")
        if model is whole:
            distributed_save(save, model, saved, base)
        else:
            save(model, saved, base=base)
        distributed.barrier()
        results.append((losses, saved, kept))
    (one, out_one, kept_one), (two, out_two, kept_two) = results
    everywhere = torch.tensor([apart(kept_one, kept_two)])
    distributed.all_reduce(everywhere, distributed.ReduceOp.MAX)
    if rank:
        return {}
    left, right = read_safetensors(out_one / "delta.safetensors"), read_safetensors(out_two / "delta.safetensors")
    assert left.keys() == right.keys()
    return {
        "loss": float((one - two).abs().max()), "tensors": apart(left, right), "count": len(left), "held": held,
        "kept": float(everywhere), "changed": changed, **happened,
    }  # fmt: skip


def apart(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """The largest difference of tensors of the same names."""
    return max((float((left[n].double() - right[n].double()).abs().max()) for n in left if left[n].numel()), default=0.0)


def sgd(parameters: dict[str, torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """Torch's, with a momentum that a course may have to drop."""
    return torch.optim.SGD(parameters.values(), lr=rate, momentum=0.9)


def torch_adamw(parameters: dict[str, torch.nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters.values(), lr=rate, eps=1e-3)


def ours(name: str, state: str = "fp32", **options: Any) -> Callable[[dict[str, torch.nn.Parameter], float], torch.optim.Optimizer]:
    """One of this package's optimizers."""
    from espalier import registry

    made = registry.make(name, "optimizer", **options)
    made.state = state
    return made.build


makers = {
    "sgd": sgd, "torch": torch_adamw, "adamw": ours("adamw", epsilon=1e-3), "adamw bf16": ours("adamw", "bf16", epsilon=1e-3),
    "galore": ours("galore", rank=4, every=1, choice="random", epsilon=1e-3),
}  # fmt: skip
"""Epsilons are such that a gradient of nothing but rounding makes no step."""
happened: Counter[str] = Counter()
"""How often state of sharded parameters was forgotten, and of how many of their numbers renewed."""


def watch_state() -> None:
    """Count in ``happened`` what courses do to the state of sharded parameters."""
    from espalier.attach import course

    forget, renew = course._forget, course._renew

    def forgotten(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
        happened["forgotten"] += parameter in optimizer.state and isinstance(parameter, DTensor)
        forget(optimizer, parameter)

    def renewed(optimizer: torch.optim.Optimizer, what: Any, seeded: bool) -> None:
        parameter = getattr(what.part, what.name)
        happened["renewed"] += int(what.places.sum()) if parameter in optimizer.state and isinstance(parameter, DTensor) else 0
        renew(optimizer, what, seeded)

    course._forget, course._renew = forgotten, renewed


def distributed_save(save: object, model: torch.nn.Module, out: Path, base: Path) -> None:
    """Save from every process, into its own folder: the model is not sharded."""
    import espalier.exchange.save as saving

    writer, saving._is_writer = saving._is_writer, lambda: True
    try:
        saving.save(model, out, base=base)
    finally:
        saving._is_writer = writer


def main(rank: int, folder: str, cases: str) -> None:
    """Run every case and write the report (rank 0)."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    watch_state()
    report = {what: run(*case, Path(folder) / what, rank) for what, case in json.loads(cases).items()}
    if rank == 0:
        (Path(folder) / "report.json").write_text(json.dumps(report))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
