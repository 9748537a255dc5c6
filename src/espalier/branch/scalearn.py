"""ScaLearn: the outputs of adapters that were trained on other tasks, each scaled by learned numbers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from espalier import registry
from espalier.anatomy.site import Site
from espalier.attach.branch import Branch
from espalier.attach.method import Tensors
from espalier.delta import store
from espalier.errors import EspalierError
from espalier.kernels.philox import Stream
from espalier.registry import brancher


@brancher(
    "scalearn", ids=(91,), paper="arXiv:2310.01217", learning_rate=6e-3, targets="mlp", form="sum_s omega_s o_s", place="sublayer",
    insertion="as its sources", composition="h + change", starts_as_base=False, needs="sources",
)  # fmt: skip
class ScaLearn(Branch):
    """Add the outputs o_s of S trained, frozen adapters at every site: ``h <- h + sum_s omega_s * o_s``.

    omega (S, d) of every site trains, without softmax and without a sum of one; it starts normal around ``total / S`` with
    deviation 0.001. Variants of the paper: ``uniform``, one number a source, omega (S, 1); ``shared`` ("++"), one omega for
    all sites. Dropout acts on the coefficients. The sources are deltas of one method at sublayers (``pfeiffer``,
    ``houlsby``, ...) with the same options; their tensors are stored with omega, so they are not needed to use the result.
    """

    sources: str = ""
    """directories of the sources' deltas, separated by commas"""
    uniform: bool = False
    """one number for each source, not one for each entry of its output"""
    shared: bool = False
    """the same numbers at all sites"""
    total: float = 2.0
    """what the coefficients of all sources start to sum to; 1 is their average"""
    omega_dropout: float = 0.3
    """probability that a coefficient is dropped in a training step, in [0, 1)"""
    number: int = 0
    """S, when there are no directories: how many sources a stored result has"""
    source: str = ""
    """their method and its options, as JSON, when there are no directories"""

    def check(self) -> None:
        if not 0 <= self.omega_dropout < 1:
            raise EspalierError(f"omega_dropout is {self.omega_dropout}; it must be at least 0 and less than 1")
        folders = [part.strip() for part in self.sources.split(",") if part.strip()]
        self._deltas = [store.load(Path(folder), branches=True) for folder in folders]
        said = {json.dumps([d.manifest["method"], d.manifest["hyperparameters"]], sort_keys=True) for d in self._deltas} or {self.source}
        if len(said) > 1:
            raise EspalierError(f"sources {self.sources} are of different methods or options: {' and '.join(sorted(said))}")
        try:
            method, options = json.loads(*said)
        except (ValueError, TypeError) as error:
            raise EspalierError(f"sources is {self.sources!r}; give the directories of trained deltas, such as those of pfeiffer") from error
        self._inner: Branch = registry.make(method, "brancher", **options)
        if self._inner.place != "sublayer":
            raise EspalierError(f"sources are of {method}, which does not act at sublayers")
        self._said, self._count = said.pop(), len(folders) or self.number
        self.insertion = self._inner.insertion  # type: ignore[misc]

    def _omega(self, width: int, stream: Stream) -> nn.Parameter:
        return nn.Parameter(self.total / self._count + 0.001 * stream.gaussian(self._count, 1 if self.uniform else width))

    def start(self, site: Site, model: nn.Module, stream: Stream) -> Tensors:
        tensors: Tensors = {}
        for name, tensor in self._inner.start(site, model, stream.named(f"{site.name} of a source")).items():
            tensors[name] = tensor.detach().new_zeros(self._count, *tensor.shape)
            for number, delta in enumerate(self._deltas):
                row = tensors[name][number]
                found = delta.branches.get(site.name, {}).get(name)
                if found is None or found.shape != row.shape:
                    what = "nothing" if found is None else f"a tensor of shape {tuple(found.shape)}"
                    raise EspalierError(f"the source {delta.folder} has {what} for {name} at {site.name}; it must be {tuple(row.shape)}")
                row.copy_(found)
        return tensors if self.shared else {**tensors, "omega": self._omega(site.width, stream)}

    def start_shared(self, sites: Sequence[Site], stream: Stream) -> Tensors:
        return {"omega": self._omega(sites[0].width, stream)} if self.shared else {}

    def prepare(self, pool: Any, sites: Sequence[Site]) -> Mapping[str, Any]:
        return dict.fromkeys((site.name for site in sites), pool.omega)

    def tensors(self, part: Any) -> Tensors:
        tensors = super().tensors(part)
        if type(self._inner).tensors is Branch.tensors:
            return tensors
        made = [self._inner.tensors(_Source(part, number)) for number in range(self._count)]
        stacked = {name: torch.stack([one[name] for one in made]) for name in made[0]}
        return stacked if self.shared else {**stacked, "omega": tensors["omega"]}

    def branch(self, part: Any, x: torch.Tensor) -> torch.Tensor:
        omega = part.context.to(x.dtype) if self.shared else part.omega
        omega = functional.dropout(omega, self.omega_dropout, part.training)
        outputs = [omega[k] * self._inner.branch(_Source(part, k), x) for k in range(self._count)]
        return torch.stack(outputs).sum(0)

    def stored(self) -> ScaLearn:
        made = copy.copy(self)
        made.sources, made.number, made.source = "", self._count, self._said
        return made

    def count(self, site: Site) -> int:
        return 0 if self.shared else self._count * (1 if self.uniform else site.width)

    def count_shared(self, sites: Sequence[Site]) -> int:
        return self._count * (1 if self.uniform else sites[0].width) if self.shared else 0


class _Source:
    """What a source's own method sees: its tensors, of those of all sources."""

    def __init__(self, part: Any, number: int) -> None:
        self.site, self.training, self.context = part.site, part.training, None
        self.names = tuple(name for name in part.names if name != "omega")
        for name in self.names:
            setattr(self, name, getattr(part, name)[number])
