"""Supports: the algebra of which entries may change, held to sets of positions, and its remapping for fused modules."""

from __future__ import annotations

import torch
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.anatomy import support as supports
from espalier.anatomy.parameters import parameters
from espalier.anatomy.structure import anatomy, couplings
from espalier.anatomy.support import EVERYTHING, NOTHING, Support, joined, parted, sections
from espalier.anatomy.target import Target


def target(name: str, *shape: int, block: int | None = 0) -> Target:
    return Target(name, (name, name + " tied"), ("other",), block, shape, False, ("weight",), "", name)


TARGETS = [target("a", 4, 6), target("b", 2, 3, 5, block=1), target("c", 7, block=None)]


def indices(most: int) -> st.SearchStrategy[torch.Tensor]:
    return st.lists(st.integers(0, most - 1), max_size=most, unique=True).map(lambda found: torch.tensor(found, dtype=torch.int64))


def named(of: dict[str, int]) -> st.SearchStrategy[dict[str, torch.Tensor]]:
    return st.fixed_dictionaries({}, optional={name: indices(most) for name, most in of.items()})


leaves = st.one_of(
    st.sampled_from([EVERYTHING, NOTHING, supports.layers([0]), supports.layers([1]), supports.tensors(["b tied"])]),
    named({"a": 4, "b": 3, "c": 7}).map(supports.rows),
    named({"a": 6, "b": 5}).map(supports.columns),
    named({"a": 24, "b": 30, "c": 7}).map(supports.entries),
    st.integers(0, 9).map(lambda seed: supports.seeded(seed, lambda t: t.size // 3)),
)
trees = st.recursive(leaves, lambda inner: st.one_of(inner.map(lambda s: ~s), st.tuples(inner, inner).map(lambda p: p[0] | p[1]), st.tuples(inner, inner).map(lambda p: p[0] & p[1])), max_leaves=5)


def held(support: Support, t: Target) -> set[int]:
    return set(support.positions(t).tolist())


@settings(max_examples=60, deadline=None)
@given(trees, trees)
def test_the_operators_are_those_of_sets(a: Support, b: Support) -> None:
    for t in TARGETS:
        everything = set(range(t.size))
        x, y = held(a, t), held(b, t)
        assert held(a | b, t) == x | y and held(a & b, t) == x & y and held(~a, t) == everything - x and held(a - b, t) == x - y
        assert held(~(a | b), t) == held(~a & ~b, t), "De Morgan"
        assert held(~(a & b), t) == held(~a | ~b, t), "De Morgan"
        assert held(~~a, t) == x


@settings(max_examples=60, deadline=None)
@given(trees)
def test_counts_are_how_many_positions_there_are(a: Support) -> None:
    assert a.counts(TARGETS) == {t.name: len(a.positions(t)) for t in TARGETS}
    for t in TARGETS:
        assert a.count(t) + (~a).count(t) == t.size
        assert a.positions(t).equal(a.positions(t).unique())


def test_structured_supports_stay_small() -> None:
    large = target("large", 1 << 20, 1 << 20)
    some = supports.rows({"large": torch.tensor([3])}) | supports.rows({"large": torch.tensor([5])}) & ~supports.layers([7])
    assert some.within(large).numel() == 1 << 20 and some.count(large) == 2 << 20
    assert EVERYTHING.within(large).numel() == 1 and (~EVERYTHING).count(large) == 0


def test_a_seeded_support_is_a_function_of_seed_name_and_shape() -> None:
    one, again, other = (supports.seeded(seed, lambda t: 5) for seed in (1, 1, 2))
    assert held(one, TARGETS[0]) == held(again, TARGETS[0]) != held(other, TARGETS[0])
    assert held(one, TARGETS[0]) != held(one, target("d", 4, 6)) and one.count(TARGETS[0]) == 5


def test_heads_and_channels_are_what_a_permutation_moves_together_however_a_model_fuses_them() -> None:
    """Every unit's entries are apart from the others', and together they are all that the coupling touches."""
    for family in ("llama", "gpt2", "gpt_neox", "phi3", "qwen3_moe", "gpt_oss"):
        model = tiny(family)
        targets = {t.name: t for t in parameters(model)}
        for coupling in couplings(anatomy(model)):
            each = [supports.units(coupling, [unit]) for unit in range(coupling.units)]
            whole = supports.units(coupling, range(coupling.units))
            for name in {member.name for member in coupling.members}:
                assert sum(one.count(targets[name]) for one in each) == whole.count(targets[name]) > 0
                assert held(supports.union(each), targets[name]) == held(whole, targets[name])
            first = next(m for m in coupling.members if m.axis == 1)
            assert first.expert is not None or held(each[0], targets[first.name]) == held(
                supports.columns({first.name: first.indices(coupling.units)[0]}), targets[first.name]
            )


def test_a_support_of_parts_is_one_of_the_fused_parameter_and_back() -> None:
    """q, k and v in one tensor, in blocks and head by head; gate_up, concatenated and interleaved; experts, dense and with biases."""
    for family, kinds in (("gpt2", {"q", "k", "v"}), ("gpt_neox", {"q", "k", "v"}), ("phi3", {"q", "k", "v", "gate", "up"}), ("qwen3_moe", {"gate", "up", "2"}), ("gpt_oss", {"gate", "up", "2"})):
        model = tiny(family)
        targets = parameters(model)
        found = {t.name: sections(anatomy(model), t) for t in targets}
        assert kinds <= {s.part.name.rpartition("/")[2] for parts in found.values() for s in parts}
        parts = [s.part for some in found.values() for s in some]
        drawn = supports.seeded(3, lambda t: t.size // 4)
        fused = joined(drawn, found)
        back = parted(fused, {t.name: t for t in targets}, found)
        for name, some in found.items():
            whole = next(t for t in targets if t.name == name)
            if some:
                assert sum(s.part.size for s in some) == whole.size, "no entry is in no part, or in two"
                assert fused.count(whole) == sum(drawn.count(s.part) for s in some)
            else:
                assert held(fused, whole) == held(drawn, whole)
        assert all(held(back, part) == held(drawn, part) for part in parts)


def test_the_rows_of_the_parts_are_those_of_the_projections() -> None:
    model = tiny("gpt_neox")
    made = anatomy(model)
    (qkv,) = [t for t in parameters(model) if t.role == "attention.qkv" and t.block == 0]
    attention = made.blocks[0].attention
    only_k = joined(supports.tensors([f"{qkv.name}/k"]), {qkv.name: sections(made, qkv)})
    rows = {row for head in range(attention.heads) for row in range(*attention.rows("k", head).indices(qkv.shape[0]))}
    assert set(only_k.mask(qkv).any(1).nonzero().flatten().tolist()) == rows and only_k.count(qkv) == qkv.size // 3
