"""Learning rates and batches by published laws, and the schedules that follow from them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

import espalier
from espalier.errors import EspalierError
from espalier.train.laws import POWER, knee, minicpm_batch, step_law
from espalier.train.schedules import factor


def test_the_step_law_falls_with_parameters_and_rises_with_tokens_and_its_batch_knows_no_parameters() -> None:
    small, large, longer = step_law(10**8, 10**10), step_law(10**9, 10**10), step_law(10**8, 10**11)
    assert small.learning_rate > large.learning_rate and longer.learning_rate > small.learning_rate
    assert small.batch_tokens == large.batch_tokens < longer.batch_tokens
    assert small.learning_rate == pytest.approx(1.79 * 1e8**-0.713 * 1e10**0.307)
    assert small.is_fitted and not step_law(10**6, 10**10).is_fitted and not step_law(10**8, 10**6).is_fitted
    with pytest.raises(EspalierError, match="0 parameters"):
        step_law(0, 10)


def test_the_batch_of_minicpm_grows_as_the_loss_falls() -> None:
    assert minicpm_batch(2.5) == round(1.21e9 / 2.5**6.24) > minicpm_batch(3.0)
    with pytest.raises(EspalierError, match="loss"):
        minicpm_batch(0.0)


def power(step: int, steps: int, sequences: int, tokens: int, peak: float = 0.02) -> float:
    return peak * factor("power", step, steps, 0, decay=1e-9, knee=knee(peak, sequences) / tokens)


def test_the_power_scheduler_is_b_a_times_a_power_of_the_tokens_and_never_above_the_peak() -> None:
    a, b = POWER
    for step in range(0, 20_000, 97):
        n = (step + 1) * 16 * 512
        assert power(step, 10**9, 16, 16 * 512) == pytest.approx(min(0.02, 16 * a * n**b))


def test_twice_the_batch_in_half_the_steps_has_exactly_twice_the_rate_at_the_same_tokens() -> None:
    for step in (99, 9_999, 99_999):
        assert power(step // 2, 10**9, 32, 32 * 512, 10.0) == pytest.approx(2 * power(2 * (step // 2) + 1, 10**9, 16, 16 * 512, 10.0))


@pytest.mark.parametrize("shape", ["wsd", "inverse_sqrt", "power"])
def test_a_longer_run_shares_the_trunk_of_a_shorter_one(shape: str) -> None:
    short, long = ([factor(shape, s, steps, 20, 0.0, 0.1, 40.0) for s in range(steps)] for steps in (300, 900))  # type: ignore[arg-type]
    assert short[:270] == long[:270] and short[-1] < 0.05
    assert all(abs(a - b) < 0.06 for a, b in pairwise(short))


def test_pretrain_takes_the_rate_of_the_law_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("To be or not to be, that is the question. " * 200)
    found = espalier.pretrain(
        str(tmp_path / "text.txt"), str(tmp_path / "out"), model="seedling", steps=2, batch_size=2, sequence_length=32,
        learning_rate="auto", schedule="power", dtype="fp32", cooldown=0.5,
    )  # fmt: skip
    said = capsys.readouterr().err
    assert "by the Step Law" in said and "a guess" in said
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines() if "learning_rate" in line]
    assert found["steps"] == 2 and max(rates) <= 1.79 * (4_676_352 - 4096 * 256) ** -0.713 * 128**0.307 * 1.01
    with pytest.raises(EspalierError, match="learning_rate is 'fast'"):
        espalier.pretrain(str(tmp_path / "text.txt"), str(tmp_path / "no"), model="seedling", learning_rate="fast")
