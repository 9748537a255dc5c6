"""What ``info`` says of deltas and calibrations: kinds, counts, and no more memory than one tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import espalier
from espalier.delta import store
from espalier.delta.fit import quantized
from espalier.delta.forms import Columns, Dense, Factored, Golomb, LowRank, Magnitude, Ternary, Update
from espalier.errors import EspalierError


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("update", "numbers"),
    [
        (Dense(random(6, 5)), 30),
        (LowRank(random(60, 3), random(3, 50)), 330),
        (quantized(LowRank(random(60, 3), random(3, 50)), 4, 64), 330),
        (quantized(Columns(random(40, 3), torch.tensor([1, 5, 6]), 30), 2, 0), 120),
        (Magnitude(torch.rand(60), LowRank(random(60, 3), random(3, 50))), 390),
        (Ternary.of(random(6, 5).sign(), torch.tensor(0.5)), 1),
        (Golomb.of(random(6, 5).sign(), torch.tensor(0.5)), 1),
        (Factored(Ternary.of(random(6, 2).sign(), torch.tensor(0.5)), Dense(random(2, 5))), 11),
    ],
    ids=lambda value: value.form if isinstance(value, Update) else "",
)
def test_the_numbers_are_those_that_the_update_holds_not_codes_indices_or_bitmaps(update: Update, numbers: int, tmp_path: Path) -> None:
    store.save(tmp_path / "d", store.Delta({"w": update}, {"w": store.Layout()}, {"base": {"name": "x"}}), "")
    found = espalier.info(str(tmp_path / "d"))
    assert found["kind"] == "delta" and found["numbers"] == numbers and found["bytes"] == update.nbytes
    assert found["forms"] == {update.form: 1}


def test_a_calibration_is_called_one_whatever_its_files_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("def double(x):\n    return 2 * x\n" * 20)
    espalier.calibrate(
        "seedling", str(tmp_path / "a.txt"), str(tmp_path / "c"), want="norm", targets="attention.q", tokens=64, sequence_length=32, quiet=True
    )
    found = espalier.info(str(tmp_path / "c"))
    assert found["kind"] == "calibration" and found["statistics"] == ["norm"] and found["places"]["norm"] > 0
    assert found["tokens"] == 64 and found["bytes"] == (tmp_path / "c").stat().st_size
    assert espalier.info(str(tmp_path / "a.txt"))["kind"] == "data"
    store.save(tmp_path / "d", store.Delta({"w": Dense(random(6, 5))}, {"w": store.Layout()}), "")
    with pytest.raises(EspalierError, match="is no calibration"):
        espalier.info(str(tmp_path / "d" / store.TENSORS))
