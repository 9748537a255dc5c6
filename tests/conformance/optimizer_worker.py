"""One of two processes that step sharded parameters; reports how they differ from whole ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

SHARDED: list[Placement] = [Shard(0)]
REPLICATED: list[Placement] = [Replicate()]
WHOLE = ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.input_layernorm.weight")
"""Parameters that every process has whole: a matrix that low-dimensional optimizers split, and a vector."""


def main(rank: int, folder: str, cases: str) -> None:
    """Run every case and write the report."""
    from test_optimizers import SHAPES, make, parameters, pull

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    shapes = {**SHAPES, "model.layers.1.mlp.up_proj.weight": (17, 12), "model.layers.1.mlp.gate_proj.weight": (72, 64)}
    shapes |= dict(zip(WHOLE, ((80, 64), (16,)), strict=True))
    report = {}
    for method, state in json.loads(cases):
        whole = parameters(shapes=shapes)
        placed = {n: REPLICATED if n in WHOLE else SHARDED for n in shapes}
        sharded = {n: torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placed[n])) for n, p in parameters(shapes=shapes).items()}
        one, two = (make(method, state, weight_decay=0.1).build(tensors, 0.01) for tensors in (whole, sharded))
        for step in range(6):
            pull(whole, step)
            for name, p in sharded.items():
                p.grad = distribute_tensor(whole[name].grad, mesh, placed[name])
            one.step()
            two.step()
        report[f"{method} {state}"] = {
            "difference": max(float((p.full_tensor() - whole[n]).detach().abs().max()) for n, p in sharded.items()),
            "replicas": replicas(two, sharded),
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
    sharded = {n: torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, SHARDED)) for n, p in whole.items()}
    one, two = (make("galore").build(tensors, 0.01) for tensors in (whole, sharded))
    usual, rule.BUCKET = rule.BUCKET, 460  # 192 and 16 x 17 numbers are more, 192 and 16 x 16 are not
    for step in range(4):
        pull(whole, step)
        for name, p in sharded.items():
            p.grad = distribute_tensor(whole[name].grad, mesh, SHARDED)
        one.step()
        two.step()
    rule.BUCKET = usual
    return max(float((p.full_tensor() - whole[n]).detach().abs().max()) for n, p in sharded.items())


def replicas(optimizer: Any, sharded: dict[str, torch.nn.Parameter]) -> dict[str, bool]:
    """Whether all that each process has whole, of parameters and of the optimizer's state, is the same bits on both; by name.

    State is whole where the parameter is, and of matrices of which all processes see the same subspace, with what has state in
    it; else its counters are.
    """
    mine = {n: p.to_local().detach() for n, p in sharded.items() if n in WHOLE}  # type: ignore[attr-defined]
    for n, p in sharded.items():
        is_whole = n in WHOLE or n in getattr(optimizer, "offsets", ())
        local = {key: t.to_local() if hasattr(t, "to_local") else t for key, t in optimizer.state[p].items()}
        mine |= {f"{key} of {n}": t for key, t in local.items() if is_whole or not t.ndim}
    both: list[Any] = [None, None]
    distributed.all_gather_object(both, mine)
    return {name: name in both[1] and torch.equal(tensor, both[1][name]) for name, tensor in both[0].items()}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
