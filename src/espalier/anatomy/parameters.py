"""Every parameter of a transformers model with its role, block, logical shape and route; and choosing among them.

Roles come from the module tree (classes, and where a module sits); the tables below hold the names that
the families of transformers use. A parameter that no rule knows has the role ``other``: it can still be
reached by name, and by ``all``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from espalier.anatomy.target import Target, at_blocks
from espalier.errors import EspalierError, suggestion

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCK = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)\.(.+)$")
"""Finds a block's number, and the rest of the name, in the name of a parameter."""

_ATTENTION = r"(?:self_attn|attn|attention|self_attention)\.(?:self\.)?"
_IN_BLOCK: tuple[tuple[str, str], ...] = (
    (_ATTENTION + r"(?:q_proj|query|q)", "attention.q"),
    (_ATTENTION + r"(?:k_proj|key|k)", "attention.k"),
    (_ATTENTION + r"(?:v_proj|value|v)", "attention.v"),
    (_ATTENTION + r"(?:c_attn|query_key_value|qkv_proj|qkv|Wqkv)", "attention.qkv"),
    (_ATTENTION + r"(?:o_proj|out_proj|c_proj|dense|output\.dense|o)", "attention.o"),
    (r"(?:.*\.)?experts\.gate_up_proj", "experts.gate_up"),
    (r"(?:.*\.)?experts\.(?:up_proj)", "experts.up"),
    (r"(?:.*\.)?experts\.down_proj", "experts.down"),
    (_ATTENTION + r"sinks", "sinks"),
    (r"(?:.*\.)?shared_expert_gate", "router.shared"),
    (r"(?:.*\.)?(?:router|mlp\.gate|block_sparse_moe\.gate)(?:\..*)?", "router"),
    (r"(?:.*\.)?gate_up_proj", "mlp.gate_up"),
    (r"(?:.*\.)?gate_proj", "mlp.gate"),
    (r"(?:.*\.)?(?:up_proj|c_fc|fc1|dense_h_to_4h|intermediate\.dense)", "mlp.up"),
    (r"(?:.*\.)?(?:down_proj|mlp\.c_proj|fc2|dense_4h_to_h|output\.dense)", "mlp.down"),
)
_OUTSIDE: tuple[tuple[str, str], ...] = (
    (r"(?:.*\.)?(?:wpe|embed_positions|position_embeddings)", "embedding.position"),
    (r"(?:.*\.)?token_type_embeddings", "embedding.type"),
    (r"(?:.*\.)?project_(?:in|out)", "projection"),
    (r"cls\.predictions\.transform\.dense", "head.transform"),
    (r"cls\.predictions", "head"),  # BERT keeps the head's bias beside the head, and ties it
    (r"(?:.*\.)?pooler(?:\..*)?", "head.pooler"),
    (r"(?:score|classifier|pre_classifier|classification_head)(?:\..*)?", "head.classifier"),
)
_NAMED: tuple[tuple[str, str], ...] = (
    (r"(?:.*\.)?(?:embed_tokens|wte|embed_in|word_embeddings)", "embedding"),
    (r"(?:.*\.)?(?:lm_head|embed_out|output)", "head"),
)
"""What a model itself says of its modules, for names without one."""
_SITES = {
    "attention.q": "attention", "attention.k": "attention", "attention.v": "attention",
    "mlp.gate": "mlp", "mlp.up": "mlp",
}  # fmt: skip

FUSED: dict[str, Literal["blocks", "heads"]] = {"gpt2": "blocks", "phi3": "blocks", "gpt_neox": "heads"}
"""Family -> rows of its fused q, k, v: all of q, then k, then v; or head after head, each with its q, k, v."""
LINEAR = ("attention", "mlp", "experts")
"""What the keyword ``linear`` stands for: every matrix of the blocks but routers."""


def _role(path: str, owner: nn.Module, local: str, model: nn.Module) -> str:
    bias = ".bias" if local == "bias" or local.endswith("_bias") else ""
    if "norm" in type(owner).__name__.lower():
        return "norm" + bias
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if owner is embeddings:
        return "embedding"
    if head is not None and owner is head:
        return "head" + bias
    inside = BLOCK.search(path + ".")
    where = inside.group(2).rstrip(".") if inside else path
    if local not in ("weight", "bias"):
        where = f"{where}.{local.removesuffix('_bias')}" if where else local
    for pattern, role in _IN_BLOCK if inside else _OUTSIDE:
        if re.fullmatch(pattern, where):
            return role + bias
    return "other" + bias


def role_of(name: str) -> str:
    """The role of a checkpoint's tensor by its name alone, where no model is made; :func:`parameters` looks at modules."""
    path, _, local = name.rpartition(".")
    bias = ".bias" if local == "bias" or local.endswith("_bias") else ""
    inside = BLOCK.search(path + ".")
    where = inside.group(2).rstrip(".") if inside else path
    last = where.rpartition(".")[2]
    if "norm" in last.lower() or re.fullmatch(r"ln_\w+", last):
        return "norm" + bias
    if local not in ("weight", "bias"):
        where = f"{where}.{local.removesuffix('_bias')}" if where else local
    for pattern, role in _IN_BLOCK if inside else _OUTSIDE + _NAMED:
        if re.fullmatch(pattern, where):
            return role + bias
    return ("experts" if ".experts." in f".{where}." else "other") + bias


def _is_experts(owner: nn.Module) -> bool:
    return hasattr(owner, "_apply_gate") and hasattr(owner, "is_transposed")


def _route(owner: nn.Module, local: str, ndim: int) -> tuple[str, bool]:
    """(route, transposed) of a parameter; only modules whose forward is known take an accelerated route."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    # the class that a module had before it took updates: a second delta sees the same targets as the first
    forward = owner.__dict__.get("_espalier_class", type(owner)).forward
    if local == "weight":
        if isinstance(owner, nn.Linear) and forward is nn.Linear.forward:
            return "linear", False
        if isinstance(owner, Conv1D) and forward is Conv1D.forward:
            return "linear", True
        scaled = type(owner).__name__.endswith("ScaledWordEmbedding")  # its forward scales what super() looks up
        if isinstance(owner, nn.Embedding) and (forward is nn.Embedding.forward or scaled) and owner.max_norm is None:
            return "lookup", False
    if _is_experts(owner) and ndim == 3:
        return "experts", bool(owner.is_transposed)
    return "weight", False


def _heads(config: Any, role: str, shape: tuple[int, ...]) -> tuple[int, int, str]:
    """Query heads, rows or columns of each, and the layout of a fused matrix, of one of an attention's; zeros for any other."""
    heads = getattr(config, "num_attention_heads", None) or 0
    if not heads or role not in ("attention.q", "attention.k", "attention.v", "attention.qkv", "attention.o") or len(shape) != 2:
        return 0, 0, ""
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    along = shape[1] if role == "attention.o" else shape[0]
    known = along % size == 0 and (role not in ("attention.q", "attention.o") or along == heads * size)
    layout = FUSED.get(config.model_type, "") if role == "attention.qkv" else ""
    return (heads, size, layout) if known and (layout or role != "attention.qkv") else (0, 0, "")


def named_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter under each of its names, in the order of ``model.named_parameters()``.

    One that is kept in another way (as codes) is no parameter of its module any more; what it left there, its shape on the
    meta device, is given for it.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        for local, parameter in module._parameters.items():
            tensor = module.__dict__.get(local) if parameter is None else parameter
            if tensor is not None:
                yield f"{path}.{local}" if path else local, tensor


def parameters(model: nn.Module) -> list[Target]:
    """All parameters of a transformers model, in the order of ``named_parameters``, tied ones once."""
    modules = dict(model.named_modules(remove_duplicate=False))  # a module in two places has two names
    config = model.config.get_text_config() if hasattr(model, "config") else None  # type: ignore[operator, union-attr]
    names: dict[int, list[str]] = {}
    tensors = {}
    for name, parameter in named_parameters(model):
        if ".espalier" in f".{name}":
            continue
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    found = []
    for key, aliases in names.items():
        shape = tuple(tensors[key].shape)
        places = [(path, modules[path], local) for path, _, local in (alias.rpartition(".") for alias in aliases)]
        roles = tuple(_role(path, owner, local, model) for path, owner, local in places)
        routes = [_route(owner, local, len(shape)) for _, owner, local in places]
        transposed = routes[0][1]
        if transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        inside = BLOCK.search(aliases[0])
        block = int(inside.group(1)) if inside else None
        site = f"{block}.{_SITES[roles[0]]}" if roles[0] in _SITES else aliases[0]
        interleaved = not getattr(places[0][1], "is_concatenated", True)
        gate_up = ("interleaved" if interleaved else "concatenated") if roles[0].endswith(".gate_up") else ""
        ways = tuple(route for route, _ in routes)
        attention = _heads(config, roles[0], shape)
        found.append(Target(aliases[0], tuple(aliases), roles, block, shape, transposed, ways, gate_up, site, *attention))
    return found


def _matches(target: Target, pattern: str) -> bool:
    if pattern == "all":
        return True
    if pattern == "linear":
        return any(_matches(target, part) for part in LINEAR)
    for role in target.roles:
        wants_bias = pattern.endswith("bias")
        if role == pattern or (role.startswith(pattern + ".") and role.endswith(".bias") == wants_bias):
            return True
        if pattern == "bias" and role.endswith(".bias"):
            return True
    return any(fnmatch.fnmatchcase(name, pattern) for name in target.names)


def select(targets: Iterable[Target], patterns: Sequence[str], option: str = "--targets") -> list[Target]:
    """The targets that any of the patterns names.

    A pattern is a role (``mlp``, ``attention.q``, ``embedding``, ``norm``, ``attention.q.bias``), one of the
    keywords ``linear`` (attention, mlp and experts), ``bias`` and ``all``, or a glob over parameter names. With a ``?`` behind
    it a pattern may match nothing, as long as another one matches. ``mlp@0-5+11`` is of these blocks alone, numbered from 0.
    ``option`` is what an error calls them.

    Raises:
        EspalierError: when a pattern matches nothing, naming the roles that the model has.
    """
    targets = list(targets)
    chosen: set[str] = set()
    for pattern in patterns:
        what, is_among = at_blocks(pattern.removesuffix("?"), option)
        matched = [target.name for target in targets if is_among(target.block) and _matches(target, what)]
        chosen.update(matched)
        if not matched and not (pattern.endswith("?") and (chosen or pattern != patterns[-1])):
            roles = sorted({role for target in targets for role in target.roles})
            heads = sorted({role.split(".")[0] for role in roles} | set(roles))
            hint = suggestion(pattern, [known for known in (*heads, "linear", "all", "bias") if known != pattern])
            if pattern in ("attention.q", "attention.k", "attention.v") and "attention.qkv" in roles:
                hint = "; this model keeps q, k and v in one matrix: use attention.qkv"
            raise EspalierError(f"{option} {pattern!r} matches no parameter of this model{hint} (roles: {', '.join(roles)})")
    if not patterns:
        raise EspalierError(f"{option} is empty; name roles such as attention,mlp or globs of parameter names")
    return [target for target in targets if target.name in chosen]
