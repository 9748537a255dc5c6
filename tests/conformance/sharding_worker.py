"""One of two processes that train a sharded model; reports how it differs from one process that does it all."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
import torch.distributed as distributed
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def run(method: str, family: str, targets: str | None, bits: int | None, folder: Path, rank: int) -> dict[str, float]:
    """Two steps in both ways; the largest differences of the losses and of the saved tensors."""
    from families import fit_for, statistics_of, tiny

    from espalier import registry
    from espalier.attach.attachment import attach, trainable_parameters
    from espalier.attach.coded_base import quantize_base
    from espalier.attach.course import Course
    from espalier.checkpoint.safetensors_file import read_safetensors
    from espalier.exchange.save import save

    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 64, (4, 9), generator=generator)

    def steps(model: torch.nn.Module, mine: torch.Tensor) -> list[float]:
        optimizer = torch.optim.SGD(trainable_parameters(model).values(), lr=0.1)
        course = Course(model, 2)
        losses = []
        for step in range(2):
            course.begin(step, 0.1, measure=lambda: float(model(mine, labels=mine).loss))
            if bits is None:
                loss = model(mine, labels=mine).loss
                (loss + course.penalty()).backward()
            else:
                loss = torch.zeros(())
                for micro in mine.chunk(2):
                    part = model(micro, labels=micro).loss / 2
                    part.backward()
                    loss += part.detach()
            course.before_step()
            optimizer.step()
            course.after_step()
            optimizer.zero_grad()
            losses.append(float(loss))
        return losses

    base = folder / f"base-{family}-{registry.find(method).settings.get('needs')}"
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
        attach(model, method, targets=targets, seed=3, statistics=statistics_of(model))
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
        losses = torch.tensor(steps(model, mine))
        if model is sharded:
            distributed.all_reduce(losses)
            losses /= 2
        out = folder / f"{method}-{family}-{bits}-{'sharded' if model is sharded else f'whole{rank}'}"
        if model is whole:
            distributed_save(save, model, out, base)
        else:
            save(model, out, base=base)
        distributed.barrier()
        results.append((losses, out))
    if rank:
        return {}
    (one, out_one), (two, out_two) = results
    left, right = read_safetensors(out_one / "delta.safetensors"), read_safetensors(out_two / "delta.safetensors")
    assert left.keys() == right.keys()
    differences = [float((left[n].double() - right[n].double()).abs().max()) for n in left if left[n].numel()]
    return {"loss": float((one - two).abs().max()), "tensors": max(differences), "count": len(left), "held": held}


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
    report = {}
    for method, family, targets, bits in json.loads(cases):
        report[f"{method} {family} {bits}"] = run(method, family, targets, bits, Path(folder), rank)
    if rank == 0:
        (Path(folder) / "report.json").write_text(json.dumps(report))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
