"""One of two processes that step sharded parameters; reports how they differ from whole ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def main(rank: int, folder: str, cases: str) -> None:
    """Run every case and write the report."""
    from test_optimizers import SHAPES, make, parameters, pull

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    shapes = {**SHAPES, "model.layers.1.mlp.up_proj.weight": (17, 12), "model.layers.1.mlp.gate_proj.weight": (72, 64)}
    report = {}
    for method, state in json.loads(cases):
        whole = parameters(shapes=shapes)
        sharded = {n: torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for n, p in parameters(shapes=shapes).items()}
        one, two = (make(method, state, weight_decay=0.1).build(tensors, 0.01) for tensors in (whole, sharded))
        for step in range(6):
            pull(whole, step)
            for name, p in sharded.items():
                p.grad = distribute_tensor(whole[name].grad, mesh, [Shard(0)])
            one.step()
            two.step()
        gathered = {n: p.full_tensor().detach() for n, p in sharded.items()}
        others = {n: distributed_copy(t) for n, t in gathered.items()}
        report[f"{method} {state}"] = {
            "difference": max(float((gathered[n] - whole[n]).abs().max()) for n in whole),
            "replicas": all(torch.equal(gathered[n], others[n]) for n in whole),
        }
    report["in pieces"] = {"difference": in_pieces(mesh)}
    if rank == 1:
        (Path(folder) / "report.json").write_text(json.dumps(report))
    distributed.destroy_process_group()


def in_pieces(mesh: Any) -> float:
    """How far galore is from itself when the processes fill their pieces at different parameters, one having a row more."""
    from test_optimizers import make, parameters, pull

    from espalier.memory import rule

    shapes = {"model.layers.0.mlp.up_proj.weight": (24, 16), "model.embed_tokens.weight": (33, 16), "model.layers.1.mlp.up_proj.weight": (24, 16)}
    whole = parameters(shapes=shapes)
    sharded = {n: torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for n, p in whole.items()}
    one, two = (make("galore").build(tensors, 0.01) for tensors in (whole, sharded))
    usual, rule.BUCKET = rule.BUCKET, 460  # 192 and 16 x 17 numbers are more, 192 and 16 x 16 are not
    for step in range(4):
        pull(whole, step)
        for name, p in sharded.items():
            p.grad = distribute_tensor(whole[name].grad, mesh, [Shard(0)])
        one.step()
        two.step()
    rule.BUCKET = usual
    return max(float((p.full_tensor() - whole[n]).detach().abs().max()) for n, p in sharded.items())


def distributed_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The first process's tensor."""
    made = tensor.clone()
    distributed.broadcast(made, 0)
    return made


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
