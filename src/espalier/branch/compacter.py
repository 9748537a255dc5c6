"""Compacter: bottlenecks whose matrices are sums of Kronecker products with factors that the whole model shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from espalier.anatomy.site import Site
from espalier.attach.branch import Branch
from espalier.attach.method import Tensors
from espalier.errors import EspalierError, at_least
from espalier.kernels.philox import Stream
from espalier.registry import brancher


@brancher(
    "compacter", ids=(53,), paper="arXiv:2106.04647", learning_rate=3e-3, size="rank", targets="attention,mlp", form="act(x W_d) W_u",
    place="sublayer", insertion="sequential", composition="h + change", starts_as_base=False,
)  # fmt: skip
class Compacter(Branch):
    """Put a bottleneck behind attention and feed-forward, each matrix ``W = sum_i A_i kron (s_i t_i)``.

    Used as x W with W (in, out). A_1 .. A_n (n, n), "slow", are one set for the whole model, in both matrices of every site;
    s (n, in/n, r) and t (n, r, out/n), "fast", are each matrix's own. A starts normal with deviation 0.01, s and t as Xavier's
    uniform, biases at zero: almost the base, not exactly; with ``zero_start`` t of W_u is zero, and it is. W is never built.
    The paper's Compacter++ is ``--targets mlp``. Not trained here: the norms, which the paper trains too.
    """

    reduction: int = 32
    """the bottleneck has 1 / reduction of the model's width (rounded up to a multiple of products), at least 1"""
    products: int = 4
    """n, how many Kronecker products are summed; it must divide the model's width"""
    rank: int = 1
    """r of s_i t_i, at least 1"""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """between the two matrices"""
    zero_start: bool = False
    """start as the base exactly"""

    def check(self) -> None:
        for name in ("reduction", "products", "rank"):
            at_least(name, getattr(self, name), 1)

    def _inner(self, site: Site) -> int:
        if site.width % self.products:
            raise EspalierError(f"products is {self.products}; it must divide the model's width, {site.width}")
        return -(-site.width // (self.reduction * self.products)) * self.products

    def start(self, site: Site, model: nn.Module, stream: Stream) -> Tensors:
        n, r, m = self.products, self.rank, self._inner(site)
        tensors: Tensors = {}
        for name, inputs, outputs in (("down", site.width, m), ("up", m, site.width)):
            for factor, shape in (("s", (n, inputs // n, r)), ("t", (n, r, outputs // n))):
                bound = (6 / (shape[1] + shape[2])) ** 0.5
                tensors[f"{name}_{factor}"] = nn.Parameter(stream.uniform(*shape, low=-bound, high=bound))
            tensors[f"{name}_bias"] = nn.Parameter(torch.zeros(outputs))
        if self.zero_start:
            tensors["up_t"] = nn.Parameter(torch.zeros_like(tensors["up_t"]))
        return tensors

    def start_shared(self, sites: Sequence[Site], stream: Stream) -> Tensors:
        return {"A": nn.Parameter(stream.gaussian(self.products, self.products, self.products) * 0.01)}

    def prepare(self, pool: Any, sites: Sequence[Site]) -> Mapping[str, Any]:
        return dict.fromkeys((site.name for site in sites), pool.A)

    def branch(self, part: Any, x: torch.Tensor) -> torch.Tensor:
        A = part.context.to(x.dtype)
        inner = _product(x, A, part.down_s, part.down_t) + part.down_bias
        return _product(getattr(torch.nn.functional, self.activation)(inner), A, part.up_s, part.up_t) + part.up_bias

    def count(self, site: Site) -> int:
        return (2 * self.rank + 1) * (site.width + self._inner(site))

    def count_shared(self, sites: Sequence[Site]) -> int:
        return self.products**3


def _product(x: torch.Tensor, A: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """``x W`` for ``W = sum_i A_i kron (s_i t_i)``: x (..., in) as (..., n, in/n), A first, so its index is the slower one."""
    z = torch.einsum("...ab,ibr->...iar", x.unflatten(-1, (A.shape[0], -1)), s)
    return torch.einsum("...iar,iac,ird->...cd", z, A, t).flatten(-2)
