"""PEFT's adapters as deltas: one function for each kind, from the tensors of a module to the updates of its parameters.

Every kind becomes a form that there is; nothing is left that a delta could not hold. Shapes are those of the model:
each tensor is checked against its parameter before anything is multiplied out. What cannot be said in a delta is
refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from espalier.anatomy.layout import Piece, locate
from espalier.anatomy.target import Target
from espalier.checkpoint.directory import ModelDirectory
from espalier.checkpoint.peft_adapter import TENSORS, Adapter, expect_sizes, read
from espalier.checkpoint.safetensors_file import torch_dtype
from espalier.delta.fit import require_finite
from espalier.delta.forms import (
    Bank,
    BlockAffine,
    Chain,
    Dense,
    Diagonal,
    Hadamard,
    Kronecker,
    LowRank,
    Magnitude,
    Permute,
    RandomBases,
    Replace,
    Sparse,
    Tiled,
    Update,
)
from espalier.delta.forms.support import compact
from espalier.delta.forms.update import matrix_shape
from espalier.delta.store import Delta, Layout
from espalier.errors import EspalierError, at_least
from espalier.exchange.new_head import found_in


@dataclass
class Part:
    """One module of an adapter, beside the parameters of the model that it changes."""

    adapter: Adapter
    module: str
    tensors: dict[str, torch.Tensor]
    target: Target
    bias: Target | None
    read: Callable[[Target], torch.Tensor]

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in) of the weight; a convolution's as (out, in * kh * kw)."""
        outputs, inputs = matrix_shape(self.target.shape)
        return outputs, inputs

    @property
    def is_lookup(self) -> bool:
        return "lookup" in self.target.routes[:1]

    def take(self, end: str, *sizes: int | None) -> torch.Tensor:
        """A tensor of those sizes, ``None`` for any."""
        if end not in self.tensors:
            raise EspalierError(f"{self.adapter.folder / TENSORS}: {self.module} has no {end}")
        return expect_sizes(self.adapter, self.module, end, self.tensors[end], sizes)

    def shared(self, name: str) -> torch.Tensor:
        if name not in self.adapter.shared:
            raise EspalierError(
                f"{self.adapter.folder / TENSORS} does not hold {name}, which PEFT draws anew from a seed; save the adapter "
                "again with save_projection=True"
            )
        return self.adapter.shared[name]

    def refuse(self, why: str) -> EspalierError:
        return EspalierError(f"{self.adapter.folder}: {self.module} {why}")


Updates = dict[str, Update]
"""Updates by the local name of the parameter: weight, bias."""


def _product(part: Part, B: torch.Tensor, A: torch.Tensor, gain: float = 1.0) -> LowRank:
    """``gain * B @ A`` of the shape of the weight."""
    return LowRank(B.contiguous(), A.contiguous(), gain, part.target.shape)


def lora(part: Part) -> Updates:
    """``W + (alpha / r) B A``; with a magnitude DoRA; with a bias of B one of the layer."""
    adapter, (outputs, inputs) = part.adapter, part.matrix
    if "lora_embedding_A" in part.tensors:
        right = part.take("lora_embedding_A", None, outputs)
        rank = right.shape[0]
        B, A = right.T, part.take("lora_embedding_B", inputs, rank).T
    else:
        A, B = _flat(part, "lora_A.weight"), _flat(part, "lora_B.weight")
        rank = A.shape[0]
        expect_sizes(adapter, part.module, "lora_A.weight", A, (None, inputs))
        expect_sizes(adapter, part.module, "lora_B.weight", B, (outputs, rank))
    alpha = adapter.number_of("lora_alpha", "alpha_pattern", part.module, rank)
    gain = alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)
    updates: Updates = {"weight": _product(part, B, A, gain)}
    magnitude = part.tensors.get("lora_magnitude_vector", part.tensors.get("lora_magnitude_vector.weight"))
    if magnitude is not None:
        updates["weight"] = _dora(part, updates["weight"], magnitude.reshape(-1))
    if "lora_B.bias" in part.tensors:
        if magnitude is not None or part.bias is None:
            raise part.refuse("has a bias of B, " + ("with DoRA" if magnitude is not None else "but the model's layer has none"))
        updates["bias"] = Dense(part.take("lora_B.bias", outputs), gain)
    return updates


def _flat(part: Part, end: str) -> torch.Tensor:
    """A factor as a matrix; those of a convolution are convolutions."""
    if end not in part.tensors:
        raise EspalierError(f"{part.adapter.folder / TENSORS}: {part.module} has no {end}")
    tensor = part.tensors[end]
    return tensor.flatten(1) if tensor.ndim == len(part.target.shape) > 3 else tensor


def _dora(part: Part, inner: Update, magnitude: torch.Tensor) -> Update:
    outputs, inputs = part.matrix
    if not part.is_lookup:
        return Magnitude(expect_sizes(part.adapter, part.module, "lora_magnitude_vector", magnitude, (outputs,)), inner)
    # of an embedding PEFT normalises the columns; their norms are those of this base
    expect_sizes(part.adapter, part.module, "lora_magnitude_vector", magnitude, (inputs,))
    weight = part.read(part.target).double()
    norms = torch.linalg.vector_norm(weight + inner.materialize(weight), dim=0)
    return Chain([inner, Diagonal(None, (magnitude.double() / norms).float(), part.target.shape)])


def adalora(part: Part) -> Updates:
    """``W + (alpha / rank) B diag(E) A``; what a masked E has put out goes with it, and a module of which nothing is left changes nothing."""
    outputs, inputs = part.matrix
    if not any(map(torch.numel, part.tensors.values())):  # PEFT keeps factors of rank 0
        return {}
    A = part.take("lora_A", None, inputs)
    B, E = part.take("lora_B", outputs, A.shape[0]), part.take("lora_E", A.shape[0], 1)
    adapter = part.adapter
    # PEFT divides by the rank that the layer began with, plus 1e-5
    start = adapter.number("init_r", 12)
    at_least(f"{adapter.path}: init_r", start, 1)
    alpha = adapter.number_of("lora_alpha", "alpha_pattern", part.module, 8)
    return {"weight": _product(part, B, A.float() * E.float(), (alpha if alpha > 0 else start) / (start + 1e-5))}


def _lycoris_gain(part: Part, rank: int | None) -> float:
    adapter = part.adapter
    r = rank or adapter.number_of("r", "rank_pattern", part.module, 8)
    at_least(f"{adapter.path}: r of {part.module}", r, 1)
    return adapter.number_of("alpha", "alpha_pattern", part.module, 8) / r


def loha(part: Part) -> Updates:
    """``(B1 A1) * (B2 A2)`` entry by entry."""
    outputs, inputs = part.matrix
    B1 = part.take("hada_w1_a", outputs, None)
    rank = B1.shape[1]
    B2 = part.take("hada_w2_a", outputs, rank)
    A1, A2 = (part.take(f"hada_w{n}_b", rank, inputs) for n in (1, 2))
    return {"weight": Hadamard(B1, A1, B2, A2, _lycoris_gain(part, rank), part.target.shape)}


def lokr(part: Part) -> Updates:
    """``kron(C, D)``, either of them whole or a product."""
    outputs, inputs = part.matrix
    rank: int | None = None
    factors: dict[str, torch.Tensor | None] = {}
    for name, number in (("A", 1), ("B", 2)):
        if f"lokr_w{number}" in part.tensors:
            factors[name], factors[f"{name}_in"] = part.take(f"lokr_w{number}", None, None)[None], None
        else:
            left = part.take(f"lokr_w{number}_a", None, rank)
            rank = left.shape[1]
            factors[name], factors[f"{name}_in"] = left[None], part.take(f"lokr_w{number}_b", rank, None)[None]
    tensors = {name: factor for name, factor in factors.items() if factor is not None}
    return {"weight": Kronecker.from_tensors(tensors, {}, (outputs, inputs), _lycoris_gain(part, rank))}


def ia3(part: Part) -> Updates:
    """Scaled inputs (of feed-forward modules), or scaled outputs, bias included."""
    outputs, inputs = part.matrix
    if part.is_lookup or len(part.target.shape) != 2:
        raise part.refuse(f"is an IA3 of a parameter of shape {part.target.shape}; imported are those of linear layers")
    scale = part.tensors.get("ia3_l")
    if scale is not None and tuple(scale.shape) == (1, inputs):
        return {"weight": Diagonal(None, part.take("ia3_l", 1, inputs)[0], part.target.shape)}
    rows = part.take("ia3_l", outputs, 1)[:, 0]
    updates: Updates = {"weight": Diagonal(rows, None, part.target.shape)}
    if part.bias is not None:
        updates["bias"] = Diagonal(rows, None, part.bias.shape)
    return updates


def vera(part: Part) -> Updates:
    """``diag(b) B diag(d) A`` with B and A cut from one pair for all modules; A is kept once for each width."""
    outputs, inputs = part.matrix
    A = expect_sizes(part.adapter, "base_model", "vera_A", part.shared("vera_A"), (None, None))
    B = expect_sizes(part.adapter, "base_model", "vera_B", part.shared("vera_B"), (None, A.shape[0]))
    if A.shape[1] < inputs or B.shape[0] < outputs:
        raise part.refuse(f"needs {outputs} x {inputs}; vera_B and vera_A are for {B.shape[0]} x {A.shape[1]}")
    b, d = part.take("vera_lambda_b", outputs), part.take("vera_lambda_d", A.shape[0])
    update = _product(part, b.float()[:, None] * B[:outputs].float() * d.float(), A[:, :inputs])
    update.shared = {"A": f"vera_A.{inputs}"}
    return {"weight": update}


def randlora(part: Part) -> Updates:
    """A sum of scaled random bases; what is cut from those of all modules is kept once for each size."""
    outputs, inputs = part.matrix
    small, large = min(outputs, inputs), max(outputs, inputs)
    lamb = part.take("randlora_lambda", None, None).float()
    rank, bases = lamb.shape
    if bases > -(-small // rank):
        raise part.refuse(f"has {bases} bases of rank {rank}; {-(-small // rank)} of them have full rank")
    gamma = part.take("randlora_gamma", bases, small).float()
    # one of them is of one basis, which all use
    A, B = part.shared("randlora_A").float(), part.shared("randlora_B").float()
    expect_sizes(part.adapter, "base_model", "randlora_A", A, (rank, 1, None))
    expect_sizes(part.adapter, "base_model", "randlora_B", B, (None, None, rank))
    if A.shape[2] < small or B.shape[0] < large or B.shape[1] < bases:
        raise part.refuse(f"needs {bases} bases of {large} x {small}; those of the adapter are {tuple(B.shape)} and {tuple(A.shape)}")
    # PEFT flattens B basis by basis and A row by row: its term (n, k) pairs what lies at k * bases + n of both
    B = B[:large, :bases].flatten(1).unflatten(1, (rank, bases)).transpose(1, 2).flatten(1)
    tensors = {"lam": lamb.T.contiguous(), "gamma": gamma, "B": B.contiguous(), "A": A[:, 0, :small].contiguous()}
    gain = part.adapter.number("randlora_alpha", 640) / rank
    update = RandomBases.from_tensors(tensors, {"bases": {}}, part.target.shape, gain)
    update.shared = {"B": f"randlora_B.{large}.{bases}", "A": f"randlora_A.{small}"}
    return {"weight": update}


def shira(part: Part) -> Updates:
    """Values added at a support."""
    outputs, inputs = part.matrix
    values = part.take("shira_weight", None)
    index = part.tensors.get("shira_indices")
    if index is None or tuple(index.shape) != (2, len(values)):
        raise part.refuse(f"has {len(values)} values at {None if index is None else tuple(index.shape)}; the support must be (2, {len(values)})")
    rows, columns = index.long()  # Windows stores them as floats
    if bool(((rows < 0) | (rows >= outputs) | (columns < 0) | (columns >= inputs)).any()):
        raise part.refuse(f"has a support outside of {outputs} x {inputs}")
    return {"weight": Sparse(shape=part.target.shape, **_at(part, rows * inputs + columns, values))}


def _at(part: Part, positions: torch.Tensor, values: torch.Tensor) -> dict[str, Any]:
    """The support and values of ``Sparse`` and ``Replace`` at flat positions of any order."""
    positions, order = positions.sort()
    if bool((positions.diff() == 0).any()):
        raise part.refuse("names an entry twice")
    return {"index": None, **compact(positions, part.target.size), "values": values[order].contiguous()}


def miss(part: Part) -> Updates:
    """A block repeated along the input; or, as ``bat``, one that also multiplies the weight's blocks."""
    outputs, inputs = part.matrix
    kind = part.adapter.config.get("init_weights", True)
    if kind == "bat":
        rank = part.take("miss_block", None, None, None).shape[-1]
        if outputs % rank or inputs % rank:
            raise part.refuse(f"has blocks of {rank}, which do not divide {outputs} x {inputs}")
        return {"weight": BlockAffine(part.take("miss_block", outputs // rank, rank, rank), part.target.shape, "row")}
    if kind == "mini":
        block = part.take("miss_block", None, None)
        if outputs % block.shape[1]:
            raise part.refuse(f"has blocks of {block.shape[1]} outputs, which do not divide {outputs}")
    elif isinstance(kind, bool):
        block = part.take("miss_block", None, outputs)
    else:
        raise EspalierError(f"{part.adapter.path}: init_weights is {kind!r}; it must be true, false, 'bat' or 'mini'")
    if block.shape[0] > inputs:
        raise part.refuse(f"has a block of {block.shape[0]} rows; the layer has {inputs} inputs")
    return {"weight": Tiled(block.T.contiguous(), part.target.shape)}


def _skew(part: Part, vectors: torch.Tensor, size: int) -> torch.Tensor:
    """Skew-symmetric matrices (blocks, size, size) of their upper triangles, in float64."""
    rows, columns = torch.triu_indices(size, size, 1)
    upper = torch.zeros(len(vectors), size, size, dtype=torch.float64)
    upper[:, rows, columns] = vectors.double()
    return upper - upper.transpose(1, 2)


def _cayley(skew: torch.Tensor) -> torch.Tensor:
    """``(I - Q) (I + Q)^-1``."""
    unit = torch.eye(skew.shape[-1], dtype=skew.dtype)
    return torch.linalg.solve(unit + skew, unit - skew, left=False)


def _neumann(skew: torch.Tensor, terms: int) -> torch.Tensor:
    """The first terms of Cayley's series ``I + 2 Q + 2 Q^2 + ...``, the last one with the factor 1, as PEFT sums them."""
    unit = torch.eye(skew.shape[-1], dtype=skew.dtype)
    if terms <= 1:
        return unit.expand_as(skew)
    total = unit + 2 * skew
    if terms > 2:
        power = skew @ skew
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total = total + 2 * power
        total = total + power @ skew
    return total


def oft(part: Part) -> Updates:
    """Inputs rotated in blocks: ``W blockdiag(R)^T`` (``W blockdiag(R)`` for an embedding)."""
    adapter, (_, inputs) = part.adapter, part.matrix
    end = "oft_embedding_R.weight" if part.is_lookup else "oft_R.weight"
    if len(part.target.shape) != 2:
        raise part.refuse(f"is an OFT of a parameter of shape {part.target.shape}; imported are matrices")
    blocks, entries = part.take(end, None, None).shape
    size = (1 + math.isqrt(1 + 8 * entries)) // 2
    count = inputs // size
    if size * (size - 1) // 2 != entries or inputs % size or blocks != (1 if adapter.config.get("block_share") else count):
        raise part.refuse(f"has {blocks} blocks of {entries} angles, which do not fit {inputs} inputs")
    skew = _skew(part, part.tensors[end], size)
    if adapter.config.get("coft"):
        eps = adapter.number("eps", 6e-5)
        at_least(f"{adapter.path}: eps", eps, 0)
        limit = eps / math.sqrt(blocks)
        norms = torch.linalg.matrix_norm(skew, keepdim=True)
        skew = torch.where(norms <= limit, skew, limit * skew / norms)
    if adapter.config.get("use_cayley_neumann", True):
        terms = adapter.number("num_cayley_neumann_terms", 5)
        if not 0 <= terms <= 1000:
            raise EspalierError(f"{adapter.path}: num_cayley_neumann_terms is {terms}; it must be at most 1000")
        rotation = _neumann(skew, int(terms))
    else:
        rotation = _cayley(skew)
    if not part.is_lookup:
        rotation = rotation.transpose(1, 2)
    return {"weight": BlockAffine(_from_unit(rotation).repeat(count // blocks, 1, 1), part.target.shape)}


def _from_unit(rotation: torch.Tensor) -> torch.Tensor:
    return (rotation - torch.eye(rotation.shape[-1], dtype=rotation.dtype)).float()


def boft(part: Part) -> Updates:
    """``diag(s) W (M_n ... M_1)^T``: inputs rotated in blocks, between permutations, and scaled outputs."""
    outputs, inputs = part.matrix
    if len(part.target.shape) != 2:
        raise part.refuse(f"is a BOFT of a parameter of shape {part.target.shape}; imported are matrices")
    R = part.take("boft_R", None, None, None, None)
    levels, blocks, size, _ = part.take("boft_R", None, None, None, R.shape[2]).shape
    if blocks * size != inputs or (levels > 1 and (size % 2 or blocks % 2 ** (levels - 1))):
        raise part.refuse(f"has {levels} levels of {blocks} blocks of {size}, which do not fit {inputs} inputs")
    s = part.take("boft_s", outputs, 1)[:, 0]
    skew = (R.double() - R.double().transpose(2, 3)) / 2
    steps: list[Update] = []
    for level in range(levels):
        rotation = BlockAffine(_from_unit(_cayley(skew[level])).transpose(1, 2).contiguous(), part.target.shape)
        order = _butterfly(inputs, blocks >> level, size // 2) if levels > 1 else torch.arange(inputs)
        if torch.equal(order, torch.arange(inputs)):
            steps.append(rotation)
        else:  # with P[i, order[i]] = 1: W P^T = W[:, order] is W permuted; P^T undoes it
            there, back = Permute(None, order.argsort(), part.target.shape), Permute(None, order, part.target.shape)
            steps += [there, rotation, back]
    steps.append(Diagonal(s, None, part.target.shape))
    return {"weight": Chain(steps)}


def _butterfly(size: int, blocks: int, half: int) -> torch.Tensor:
    """The permutation that pairs blocks: in each of ``blocks`` parts the even runs of ``half`` come before the odd ones."""
    runs = torch.arange(size).view(blocks, -1, half)
    return torch.cat((runs[:, ::2], runs[:, 1::2]), 1).flatten()


def poly(part: Part) -> Updates:
    """A bank of skills, ``B_t A_t / r`` for each of the numbered tasks; heads are PEFT's splits. It keeps factors as (in, r), (r, out)."""
    adapter, (outputs, inputs) = part.adapter, part.matrix
    heads, skills, _, rank = part.take("poly_lora_A", None, None, None, None).shape
    if outputs % heads or inputs % heads:
        raise part.refuse(f"has {heads} splits, which do not divide {outputs} x {inputs}")
    tasks = adapter.number("n_tasks", 1)
    Z = part.take("poly_router.module_logits", int(tasks), heads * skills).unflatten(1, (heads, skills))
    A = part.take("poly_lora_A", heads, skills, inputs // heads, rank).transpose(-1, -2)
    B = part.take("poly_lora_B", heads, skills, rank, outputs // heads).transpose(-1, -2)
    return {"weight": Bank(B.contiguous(), A.contiguous(), Z, 1 / rank, shape=part.target.shape)}


def trainable_tokens(part: Part) -> Updates:
    """Rows of the embedding, set."""
    adapter = part.adapter
    named = adapter.config.get("token_indices" if adapter.kind == "TRAINABLE_TOKENS" else "trainable_token_indices")
    if isinstance(named, dict):
        fits = [value for key, value in named.items() if f".{part.module}".endswith(f".{key}")]
        named = fits[0] if fits else None
    tokens, width = matrix_shape(part.target.shape)
    if not isinstance(named, list) or not all(type(i) is int and 0 <= i < tokens for i in named):
        raise EspalierError(f"{adapter.path}: the trained tokens of {part.module} are {named!r}; they must be a list of ids below {tokens}")
    end = next(name for name in part.tensors if name.endswith("trainable_tokens_delta"))
    values = part.take(end, len(named), width)
    positions = (torch.tensor(named)[:, None] * width + torch.arange(width)).flatten()
    return {"weight": Replace(shape=part.target.shape, **_at(part, positions, values.flatten()))}


IMPORTS: dict[str, Callable[[Part], Updates]] = {
    "LORA": lora, "ADALORA": adalora, "LOHA": loha, "LOKR": lokr, "IA3": ia3, "VERA": vera, "RANDLORA": randlora, "OFT": oft, "BOFT": boft,
    "SHIRA": shira, "MISS": miss, "POLY": poly, "TRAINABLE_TOKENS": trainable_tokens,
}  # fmt: skip
"""PEFT's name of a kind -> what makes updates of a module of it."""


def import_adapter(folder: Path, parameters: Mapping[str, Target], base: ModelDirectory) -> Delta:
    """A PEFT adapter as a delta of a model with these parameters.

    Copies of the base's tensors that the adapter also holds (``modules_to_save``, trained biases, embeddings) become
    updates that set them, where they differ from the base.

    Args:
        folder: the adapter's directory.
        parameters: the model's, by name.
        base: where the model's own tensors are read, for what depends on them.

    Raises:
        EspalierError: when the adapter cannot be read, does not fit the model, or changes one side of a tie alone.
    """
    adapter = read(folder)
    aliases = {alias: target for target in parameters.values() for alias in target.names}
    found: dict[str, dict[str, Update]] = {}  # parameter -> one of its names -> update

    def put(alias: str, update: Update) -> None:
        target = aliases[alias]
        if alias in found.setdefault(target.name, {}):
            raise EspalierError(f"{folder} changes {alias} in two ways")
        found[target.name][alias] = update

    for module, tensors in adapter.modules.items():
        if adapter.config.get("target_parameters") and f"{module}.weight" not in aliases:
            for name, update in _experts(adapter, module, tensors, aliases).items():
                put(name, update)
            continue
        target = aliases.get(f"{module}.weight")
        if target is None or len(target.shape) < 2:
            raise EspalierError(f"{folder} adapts {module!r}, which the model does not have")
        part = Part(adapter, module, tensors, target, aliases.get(f"{module}.bias"), lambda t: _stored(t, base))
        is_tokens = any(end.endswith("trainable_tokens_delta") for end in tensors)
        if is_tokens and len(tensors) > 1:
            raise part.refuse("has trained tokens and factors, which one update cannot hold")
        try:
            made = (trainable_tokens if is_tokens else IMPORTS[adapter.kind])(part)
            for update in made.values():
                require_finite(update)
        except EspalierError as error:
            raise error if str(folder) in str(error) else EspalierError(f"{folder}: the update of {module}: {error}") from error
        for local, update in made.items():
            # PEFT keeps tied embeddings tied when it trains tokens
            for alias in target.names if is_tokens and local == "weight" else (f"{module}.{local}",):
                if alias not in found.get(target.name, {}) or not is_tokens:
                    put(alias, update)
    for name, copy in adapter.copies.items():
        _put_copy(adapter, name, copy, aliases, base, found, put)
    updates: dict[str, Update] = {}
    for name, sides in found.items():
        if (one := _of_tie(folder, parameters[name], sides, base)) is not None:
            updates[name] = one
    if not updates:
        raise EspalierError(f"{folder / TENSORS} changes nothing in the base")
    method = "dora" if adapter.kind == "LORA" and adapter.config.get("use_dora") else adapter.kind.lower()
    manifest = {"method": method, "hyperparameters": {"rank": adapter.config["r"]} if "r" in adapter.config else {}}
    if bank := next((update for update in updates.values() if isinstance(update, Bank)), None):
        manifest["tasks"] = [str(number) for number in range(bank.tasks)]
    return Delta(updates, {name: Layout.of(parameters[name]) for name in updates}, manifest)


def _experts(adapter: Adapter, module: str, tensors: dict[str, torch.Tensor], aliases: Mapping[str, Target]) -> dict[str, Update]:
    """LoRA of fused experts, which PEFT names by the module alone: wrapped within each other where it adapts several.

    A wraps B when its name was found later: among the module's own parameters, in their order, those that are adapted.
    """
    named = adapter.config["target_parameters"]
    owner, depth = module, 0
    while owner.endswith(".base_layer"):
        owner, depth = owner.removesuffix(".base_layer"), depth + 1
    if not isinstance(named, list) or not all(isinstance(n, str) for n in named):
        raise EspalierError(f"{adapter.path}: target_parameters is {named!r}; it must be a list of names")
    adapted = [
        alias for alias in aliases
        if alias.rpartition(".")[0] == owner and any(f".{alias}".endswith(f".{name}") for name in named)
    ]  # fmt: skip
    if depth >= len(adapted):
        raise EspalierError(f"{adapter.folder} adapts {module!r}, which the model does not have")
    name = adapted[::-1][depth]
    target = aliases[name]
    if len(target.shape) != 3:
        raise EspalierError(f"{adapter.folder} adapts {name} of shape {target.shape}; imported are fused experts, of 3 dimensions")
    experts, outputs, inputs = target.shape
    part = Part(adapter, module, tensors, target, None, lambda t: torch.empty(0))
    A = part.take("lora_A.weight", None, inputs)
    rank, rest = divmod(len(A), experts)
    if rest or set(tensors) != {"lora_A.weight", "lora_B.weight"}:
        raise part.refuse(f"has {sorted(tensors)} with {len(A)} rows of A; {experts} experts need A and B of a multiple of them")
    B = part.take("lora_B.weight", outputs, rank * experts)
    alpha = adapter.number_of("lora_alpha", "alpha_pattern", name, rank)
    gain = alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)
    A = A.reshape(experts, rank, inputs)
    B = B.reshape(outputs, rank, experts).permute(2, 0, 1).contiguous()  # (experts, out, rank)
    return {name: LowRank(B, A, gain)}


def _put_copy(
    adapter: Adapter, name: str, copy: torch.Tensor, aliases: Mapping[str, Target], base: ModelDirectory,
    found: Mapping[str, Mapping[str, Update]], put: Callable[[str, Update], None],
) -> None:  # fmt: skip
    """A tensor that the adapter holds whole: a parameter that is set, or the base of its own factors."""
    alias = name.replace(".base_layer.", ".")
    target = aliases.get(alias)
    if target is None:
        raise EspalierError(f"{adapter.folder / TENSORS} holds {name!r}, which is no tensor of a {adapter.kind} adapter, nor of the model")
    logical = copy.transpose(-1, -2) if target.transposed and copy.ndim > 1 else copy
    if alias in found.get(target.name, {}) and name.endswith(".base_layer.weight"):
        if not _is_base(logical, target, base):
            raise EspalierError(f"{adapter.folder} holds another {alias} than the base; it was made for another model, or changed it")
        return
    if tuple(logical.shape) != target.shape:
        raise EspalierError(f"{adapter.folder / TENSORS}: {name} has shape {tuple(copy.shape)}; the model's {alias} has {target.shape}")
    held = found_in(base, target)
    stored = torch_dtype(base.info(held[0]).dtype) if held else copy.dtype
    if copy.is_floating_point() != stored.is_floating_point:
        raise EspalierError(f"{adapter.folder / TENSORS}: {name} is {copy.dtype}; the model's {alias} is {stored}")
    put(alias, Replace(logical.contiguous()))


def _pieces(target: Target, base: ModelDirectory) -> list[Piece]:
    return locate(target.name, target.names, target.shape[0] if len(target.shape) == 3 else None, base)


def _stored(target: Target, base: ModelDirectory) -> torch.Tensor:
    """A parameter of the base, in its logical shape."""
    pieces = _pieces(target, base)
    if pieces[0].expert is None:
        weight = base.read(pieces[0].names[0])
        return weight.transpose(-1, -2) if target.transposed else weight
    return torch.stack([torch.cat([base.read(name) for name in piece.names]) for piece in pieces])


def _is_base(values: torch.Tensor, target: Target, base: ModelDirectory) -> bool:
    return tuple(values.shape) == target.shape and torch.equal(_stored(target, base).to(values.dtype), values)


def _of_tie(folder: Path, target: Target, sides: Mapping[str, Update], base: ModelDirectory) -> Update | None:
    """The one update of a parameter; ``None`` for a copy of what the base holds. All sides of a tie must change alike."""

    def unchanged(update: Update) -> bool:
        return isinstance(update, Replace) and update.ignores_base and bool(found_in(base, target)) and _is_base(update.values, target, base)

    changed = {alias: update for alias, update in sides.items() if not unchanged(update)}
    if not changed:
        return None
    first = next(iter(changed.values()))
    if set(changed) != set(target.names) or not all(first.equals(other) for other in changed.values()):
        raise EspalierError(
            f"{folder} adapts {', '.join(changed)}, one side of the tie {' = '.join(target.names)}, and the other differently or not; "
            "a tied model cannot hold that"
        )
    return first
