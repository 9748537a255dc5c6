"""One of two processes that train SpIEL on a sharded model; reports supports and values beside those of one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as distributed
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def trained(growth: str, family: str, targets: str, mine: bool, rank: int) -> dict[str, list[float]]:
    """Supports and values after 8 steps, by name; with ``mine``, each process has half of the rows."""
    from families import tiny, tokens

    from espalier import registry
    from espalier.attach.attachment import attach, attachments, trainable_parameters
    from espalier.attach.course import Course
    from espalier.kernels.sharded import whole
    from espalier.memory.joined_optimizer import build

    found = {}
    for sharded in (False, True):
        model = attach(tiny(family, num_hidden_layers=1), "spiel", targets=targets, growth=growth, every=3, collect=1, rate=0.8, density=0.05)
        if sharded:
            for block in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
                fully_shard(block)
            fully_shard(model)
        course = Course(model, 9)
        optimizer = build(registry.make("adamw", "optimizer").build, trainable_parameters(model), 0.01, {})
        for step in range(8):
            course.begin(step, 0.01, optimizer)
            x = tokens(rows=4, seed=step)
            x = x[rank * 2 : rank * 2 + 2] if sharded and mine else x
            model(x, labels=x).loss.backward()
            course.before_step()
            optimizer.step()
            course.after_step()
            optimizer.zero_grad()
        for part in attachments(model)["spiel"].parts:
            values = whole(part.values.detach())[part.slot.long()]
            found[f"{'sharded' if sharded else 'whole'} {part.target.name}"] = [part.index.tolist(), values.tolist()]
    return found


def main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    cases = [("gradient", "llama", "mlp", False), ("gradient", "llama", "mlp", True), ("gradient", "qwen3_moe", "experts", True), ("momentum", "llama", "mlp", True)]
    report = [trained(*case, rank) for case in cases]  # type: ignore[arg-type]
    (Path(folder) / f"report{rank}.json").write_text(json.dumps(report))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
