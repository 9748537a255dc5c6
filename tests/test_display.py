"""What is shown where no terminal is."""

from __future__ import annotations

import pytest

from espalier.display import Display


def test_a_bar_that_is_updated_at_its_end_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Display().bar("merging", 10, "MiB") as update:
        for done in (1, 10, 10, 10):
            update(done)
    assert capsys.readouterr().err.count("10/10 MiB") == 1
