"""The generator: known answers of the reference implementation, golden draws, and what each draw promises.

The golden numbers were computed once with a generator written apart, in Python integers; a change of any of them
is a change of every seeded basis, index and starting value that a delta on disk relies on.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from espalier.errors import EspalierError
from espalier.kernels.hadamard import SignedHadamard, hadamard
from espalier.kernels.philox import SMALL, Device, Distribution, Stream, numbers, philox, plain_numbers

# (counter, key, output): the philox4x32 lines of tests/kat_vectors in DEShawResearch/random123
KNOWN_ANSWERS = {
    10: [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    7: [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ],
}


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("rounds", KNOWN_ANSWERS)
def test_the_known_answers_of_random123(rounds: int) -> None:
    for counter, key, output in KNOWN_ANSWERS[rounds]:
        found = philox(torch.tensor([words(counter)]), tuple(words(key)), rounds)
        assert found.tolist() == [words(output)]


def test_counters_do_not_disturb_one_another() -> None:
    counters = torch.tensor([words(counter) for counter, _, _ in KNOWN_ANSWERS[10]] * 2)
    together = philox(counters, (1, 2))
    assert together.tolist() == [philox(c[None], (1, 2))[0].tolist() for c in counters]


def stream() -> Stream:
    return Stream(7, "weight")


GOLDEN: dict[str, tuple[Callable[[Stream], torch.Tensor], list]] = {
    "integers32": (lambda s: s.integers32(6), [1529709551, 1394697459, 4178191745, 703638462, 1858246496, 3950194730]),
    "uniform": (lambda s: s.uniform(4), [5975427 / 2**24, 5448036 / 2**24, 16321061 / 2**24, 2748587 / 2**24]),
    "uniform in [-2, 2)": (
        lambda s: s.uniform(2, 2, low=-2, high=2),
        [[5975427 / 2**22 - 2, 5448036 / 2**22 - 2], [16321061 / 2**22 - 2, 2748587 / 2**22 - 2]],
    ),
    "rademacher": (lambda s: s.rademacher(12), [-1, -1, 1, -1, -1, 1, 1, -1, -1, -1, 1, 1]),
    "sparse_rademacher": (lambda s: s.sparse_rademacher(12), [0, 0, 0, -1, 0, 0, 1, -1, 0, -1, 0, 0]),
    "gaussian": (
        lambda s: s.gaussian(6),
        [float.fromhex(f"{h}p-26") for h in ("-0x1799564", "-0x1d16bc8", "0x7b212f8", "-0x3ea58c8", "-0xadb04e", "0x59cf198")],
    ),
    "kaiming_uniform": (
        lambda s: s.kaiming_uniform(4, 1, fan_in=4),
        [[5975427 / 2**24 - 0.5], [5448036 / 2**24 - 0.5], [16321061 / 2**24 - 0.5], [2748587 / 2**24 - 0.5]],
    ),
    "permutation": (lambda s: s.permutation(10), [7, 9, 3, 8, 1, 0, 4, 6, 5, 2]),
    "choice": (lambda s: s.choice(20, 6), [1, 3, 7, 8, 9, 16]),
    "choice of few": (lambda s: s.choice(10**12, 4), [45681959654, 123945522648, 225971523521, 994542373898]),
}


@pytest.mark.parametrize("draw", GOLDEN)
def test_the_golden_numbers_of(draw: str) -> None:
    make, expected = GOLDEN[draw]
    assert make(stream()).tolist() == expected


def test_the_gaussian_table_is_the_quantile_function_of_the_standard_normal() -> None:
    """At the midpoints of 65,536 equal probabilities, to the rounding of float32."""
    words = stream().integers32(4096)
    probability = ((words >> 16).double() + 0.5) / 65536
    exact = math.sqrt(2) * torch.erfinv(2 * probability - 1)
    torch.testing.assert_close(stream().gaussian(4096).double(), exact, rtol=1e-6, atol=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), max_size=8))
def test_a_draw_does_not_depend_on_how_it_is_split(sizes: list[int]) -> None:
    source = stream()
    parts = [source.integers32(size) for size in sizes]
    assert torch.equal(torch.cat([*parts, torch.empty(0, dtype=torch.int64)]), stream().integers32(sum(sizes)))


def test_a_draw_does_not_depend_on_its_blocks_of_work() -> None:
    whole = stream().integers32((1 << 20) + 9)
    source = stream()
    assert torch.equal(torch.cat((source.integers32((1 << 20) - 3), source.integers32(12))), whole)


def test_kinds_of_draws_follow_one_another_in_one_sequence() -> None:
    source = stream()
    source.gaussian(3), source.permutation(4)
    assert source.integers32(2).tolist() == stream().integers32(9)[7:].tolist()


def test_other_names_and_other_seeds_give_other_numbers() -> None:
    draws = {
        tuple(Stream(seed, name).integers32(4).tolist())
        for seed in (0, 1, -1, 2**40, 71)
        for name in ("", "weight", "weight ", "bias", "1|weight")
    }
    assert len(draws) == 25
    assert torch.equal(Stream(3, "weight").integers32(4), Stream(3, "weight").integers32(4))


def test_a_stream_gives_streams_of_other_names_from_their_beginning() -> None:
    """Of its own class, so that whoever replaces the source of numbers replaces all of them."""

    class Zeros(Stream):
        def numbers(self, count: int, distribution: Distribution, device: Device) -> torch.Tensor:
            return torch.zeros(count, dtype=distribution.dtype, device=device)

    source = Stream(3, "weight")
    source.integers32(5)
    assert torch.equal(source.named("bias").integers32(4), Stream(3, "bias").integers32(4))
    assert not Zeros(3, "weight").named("bias").integers32(4).any() and not Zeros(3, "weight").at(9).uniform(2, 3).any()


COUNT = 200_000


def close(found: torch.Tensor, expected: float, deviation: float) -> bool:
    """Whether a mean of COUNT numbers is within 5 of its standard errors."""
    return abs(float(found.double().mean()) - expected) < 5 * deviation / math.sqrt(COUNT)


def test_the_moments_of_uniform_numbers() -> None:
    x = stream().uniform(COUNT, low=-1.0, high=1.0)
    assert x.dtype == torch.float32 and float(x.min()) >= -1 and float(x.max()) < 1
    assert close(x, 0, math.sqrt(1 / 3)) and close(x.square(), 1 / 3, math.sqrt(4 / 45))
    counts = torch.histc(x, 100, -1, 1)
    assert float(((counts - COUNT / 100) ** 2 / (COUNT / 100)).sum()) < 99 + 5 * math.sqrt(2 * 99)  # chi-squared


def test_the_moments_of_gaussian_numbers() -> None:
    x = stream().gaussian(COUNT)
    assert close(x, 0, 1) and close(x.square(), 1, math.sqrt(2)) and close(x.pow(3), 0, math.sqrt(15))
    assert close(x.pow(4), 3, math.sqrt(96))
    assert close(x[1:] * x[:-1], 0, 1)


def test_the_moments_of_rademacher_numbers() -> None:
    x = stream().rademacher(COUNT)
    assert set(x.tolist()) == {-1.0, 1.0} and close(x, 0, 1)
    assert close(x[1:] * x[:-1], 0, 1)


@pytest.mark.parametrize("sparsity", [1.0, 3.0, 16.0])
def test_the_moments_of_sparse_rademacher_numbers(sparsity: float) -> None:
    x = stream().sparse_rademacher(COUNT, sparsity=sparsity)
    kept = 1 / sparsity
    assert set(x.tolist()) <= {-1.0, 0.0, 1.0}
    assert close(x, 0, math.sqrt(kept)) and close(x.abs(), kept, math.sqrt(kept * (1 - kept)) + 1e-9)


def test_shapes_are_those_asked_for() -> None:
    assert stream().uniform(2, 3).shape == (2, 3) and stream().gaussian(0, 4).shape == (0, 4)
    assert stream().rademacher(5, 1, 2).shape == (5, 1, 2) and stream().kaiming_uniform(2, 3, 4).shape == (2, 3, 4)
    bound = 1 / math.sqrt(4)
    assert bound * 0.9 < float(stream().kaiming_uniform(64, 4).abs().max()) <= bound


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 300), st.integers(-5, 5))
def test_a_permutation_holds_every_index_once(count: int, seed: int) -> None:
    found = Stream(seed, "order").permutation(count)
    assert found.dtype == torch.int64 and sorted(found.tolist()) == list(range(count))


def test_every_place_of_a_permutation_is_as_likely_for_every_index() -> None:
    source = stream()
    orders = torch.stack([source.permutation(5) for _ in range(2000)])
    for place in range(5):
        counts = torch.bincount(orders[:, place], minlength=5).double()
        assert float(((counts - 400) ** 2 / 400).sum()) < 4 + 5 * math.sqrt(8)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 200), st.integers(0, 220), st.integers(0, 5))
def test_a_choice_is_distinct_and_sorted(count: int, chosen: int, seed: int) -> None:
    found = Stream(seed, "choice").choice(count, chosen).tolist()
    assert found == sorted(set(found)) and len(found) == min(count, chosen)
    assert all(0 <= member < count for member in found)


@pytest.mark.parametrize("chosen", [2, 5])
def test_every_member_is_chosen_equally_often(chosen: int) -> None:
    """Of 8: two are drawn one after another, five are the first of a permutation."""
    source = stream()
    counts = torch.bincount(torch.cat([source.choice(8, chosen) for _ in range(4000)]), minlength=8).double()
    expected = 4000 * chosen / 8
    assert float(((counts - expected) ** 2 / expected).sum()) < 7 + 5 * math.sqrt(14)


# any place of a stream, any device


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 40), st.integers(0, 12))
def test_a_stretch_of_a_stream_is_drawn_without_what_is_before_it(position: int, count: int) -> None:
    source = stream()
    assert torch.equal(source.at(position).gaussian(count), stream().gaussian(60)[position : position + count])
    assert source.position == 0 and source.at(position).position == position


def test_counters_pass_32_bits() -> None:
    far = 4 * ((1 << 32) - 2)
    expected = philox(torch.tensor([[0xFFFFFFFE, 0, 0, 0], [0xFFFFFFFF, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]]), stream().key)
    assert torch.equal(stream().at(far).integers32(16), expected.reshape(-1))
    assert torch.equal(numbers(stream().key, far - 4 * SMALL, 4 * SMALL + 16, Distribution("integers32"))[-16:], expected.reshape(-1))


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [("normal", ()), ("uniform", ()), ("uniform", (0.0, math.inf)), ("gaussian", (1.0,)), ("sparse_rademacher", (0.5,))],
)
def test_a_distribution_that_is_none_is_refused(kind: str, parameters: tuple[float, ...]) -> None:
    with pytest.raises(EspalierError, match=f"{kind}|sparsity"):
        Distribution(kind, parameters)


DISTRIBUTIONS = [
    Distribution("integers32"),
    Distribution("uniform", (0.0, 1.0)),
    Distribution("uniform", (-0.3, 0.7)),
    Distribution("rademacher"),
    Distribution("sparse_rademacher", (3.0,)),
    Distribution("sparse_rademacher", (1.0,)),
    Distribution("sparse_rademacher", (47.3,)),
    Distribution("gaussian"),
]
every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: f"{d.kind}{d.parameters}")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """So that 0 and -0 differ."""
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else tensor.dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every_distribution
def test_a_gpu_makes_the_same_bits(distribution: Distribution) -> None:
    for position, count in ((0, 1), (3, 1000), (5, 300_001)):
        found = Stream(11, "gpu", position).draw(distribution, count, device="cuda")
        assert found.is_cuda
        assert torch.equal(bits(found.cpu()), bits(plain_numbers(Stream(11, "gpu").key, position, count, distribution)))


def test_draws_are_made_on_the_device_that_is_asked_for() -> None:
    """Torch's device without storage stands for any other."""
    source = stream()
    drawn = [source.uniform(2, 3, device="meta"), source.gaussian(SMALL, device="meta"), source.integers32(4, device="meta")]
    assert all(d.is_meta for d in drawn) and source.position == 6 + SMALL + 4


# the compiled twin


@pytest.fixture(scope="module")
def twin():  # type: ignore[no-untyped-def]
    pytest.importorskip("numba")
    from espalier.kernels import philox_fast

    return philox_fast


@every_distribution
@settings(deadline=None, max_examples=40)
@given(
    position=st.one_of(st.integers(0, 7), st.integers(0, 2**34), st.integers(2**34 - 4000, 2**34)),
    count=st.one_of(st.integers(0, 40), st.integers(1000, 4200)), seed=st.integers(-(2**40), 2**40),
)  # fmt: skip
def test_the_compiled_twin_makes_the_same_bits(twin, distribution: Distribution, position: int, count: int, seed: int) -> None:  # type: ignore[no-untyped-def]
    key = Stream(seed, "twins").key
    found = torch.full((count + 2,), 77, dtype=distribution.dtype)
    twin.fill(found[1:-1], key, position, distribution)
    assert torch.equal(bits(found[1:-1]), bits(plain_numbers(key, position, count, distribution)))
    assert found[0] == 77 and found[-1] == 77, "nothing beside the numbers is written"


@every_distribution
def test_the_compiled_twin_makes_the_same_bits_on_any_number_of_threads(twin, distribution: Distribution) -> None:  # type: ignore[no-untyped-def]
    count, threads = 3 * twin.PART + 5, torch.get_num_threads()
    expected = plain_numbers(stream().key, 6, count, distribution)
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found = torch.empty(count, dtype=distribution.dtype)
            twin.fill(found, stream().key, 6, distribution)
            assert torch.equal(bits(found), bits(expected))
    finally:
        torch.set_num_threads(threads)


@every_distribution
def test_large_draws_are_the_numbers_of_small_ones(distribution: Distribution) -> None:
    """Whichever twin makes them."""
    source = stream()
    parts = [source.draw(distribution, SMALL - 7), source.draw(distribution, 2 * SMALL + 3), source.draw(distribution, 5)]
    assert torch.equal(bits(torch.cat(parts)), bits(stream().draw(distribution, 3 * SMALL + 1)))


RUN = """
import sys
import espalier.adapt.lora, torch
from espalier.kernels import philox
stream = philox.Stream(5, "a")
stream.gaussian(philox.SMALL)
assert sys.modules.get("numba") is None, "few numbers imported numba"
stream.gaussian(philox.MANY - philox.SMALL - 1)
assert sys.modules.get("numba") is None, "not yet so many numbers imported numba"
drawn = stream.gaussian(philox.SMALL)
assert (sys.modules.get("numba") is not None) == (sys.argv[1] == "there"), "numba"
expected = philox.plain_numbers(stream.key, philox.MANY - 1, philox.SMALL, philox.GAUSSIAN)
assert torch.equal(drawn, expected)
"""


def run_drawing(numba: str, **environment: str) -> None:
    hidden = "" if numba == "there" else "import sys; sys.modules['numba'] = None\n"
    script = hidden + RUN
    done = subprocess.run(
        [sys.executable, "-c", script, numba], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_numba_the_plain_twin_draws() -> None:
    run_drawing("not there")


def test_numba_is_imported_by_many_draws_only() -> None:
    pytest.importorskip("numba")
    run_drawing("there")


def test_a_cache_of_compiled_code_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    blocked = tmp_path / "file"
    blocked.write_text("")
    run_drawing("there", NUMBA_CACHE_DIR=str(blocked / "cache"), NUMBA_CACHE_LOCATOR_CLASSES="UserProvidedCacheLocator")


def test_a_forked_process_draws_the_same_numbers(twin) -> None:  # type: ignore[no-untyped-def]
    count = 2 * twin.PART
    expected = stream().gaussian(count)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert torch.equal(torch.from_numpy(pool.apply(_gaussian_array, (count,))), expected)


def _gaussian_array(count: int) -> np.ndarray:
    return stream().gaussian(count).numpy()


# orthonormal rows


def sylvester(size: int) -> torch.Tensor:
    """The Hadamard matrix by its recursion, float64, divided by sqrt(size)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


@pytest.mark.parametrize("size", [1, 2, 4, 32, 256])
def test_the_fast_transform_is_the_product_with_the_hadamard_matrix(size: int) -> None:
    x = torch.randn(3, 2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hadamard(x), x @ sylvester(size))
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    assert torch.autograd.gradcheck(hadamard, x[:1, :, :8].clone().requires_grad_())


@pytest.mark.parametrize(("count", "size"), [(0, 4), (1, 1), (5, 16), (64, 64), (100, 1024)])
def test_signed_permuted_hadamard_rows_are_orthonormal(count: int, size: int) -> None:
    basis = SignedHadamard.draw(stream(), count, size)
    Q = basis.dense()
    assert Q.shape == (count, size)
    torch.testing.assert_close(Q @ Q.T, torch.eye(count), rtol=0, atol=1e-5)
    torch.testing.assert_close(Q.abs(), torch.full((count, size), size**-0.5))
    x, c = torch.randn(7, size), torch.randn(7, count)
    torch.testing.assert_close(basis.project(x), x @ Q.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(basis.lift(c), c @ Q, rtol=1e-4, atol=1e-5)
    assert torch.equal(SignedHadamard.draw(stream(), count, size).dense(), Q)


def test_hadamard_rows_that_do_not_exist_are_refused() -> None:
    with pytest.raises(EspalierError, match="size 12; it must be a power of two"):
        SignedHadamard.draw(stream(), 3, 12)
    with pytest.raises(EspalierError, match="power of two"):
        hadamard(torch.zeros(3, 0))
    with pytest.raises(EspalierError, match="5 orthonormal rows of length 4"):
        SignedHadamard.draw(stream(), 5, 4)
