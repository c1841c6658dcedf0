"""Every family gives diffusers' own images: every scheduler that a job may name, and every one of a model's own."""

from pathlib import Path

import pytest

from tests.model_differences import CASES, Both

TOLERANCE = 1e-5
# `test_schedulers.py` has all combinations of Stable Diffusion's.
COMPARED = [name for name in CASES if name != "Stable Diffusion"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPARED)
def test_images_are_those_of_diffusers(name: str, tmp_path: Path, hardware) -> None:
    """From the same seeds, the noise of the steps included, with guidance on and off."""
    both = Both(CASES[name], tmp_path / "model", hardware)
    cells = [(scheduler, scale) for scheduler in both.case.schedulers for scale in both.case.scales]
    differences = {cell: both.difference(*cell) for cell in cells}
    assert {cell: difference for cell, difference in differences.items() if difference >= TOLERANCE} == {}
