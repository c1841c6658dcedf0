"""Every family gives diffusers' own images: every scheduler that a job may name, and every one of a model's own."""

import itertools
from pathlib import Path

import pytest

from tests.model_differences import CASES, Both

TOLERANCE = 1e-5
# `test_schedulers.py` has all combinations of Stable Diffusion's.
COMPARED = [name for name in CASES if name != "Stable Diffusion"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPARED)
def test_images_are_those_of_diffusers(name: str, tmp_path: Path, hardware) -> None:
    """From the same seeds, the noise of the steps included; each scheduler with guidance on or off, by turns."""
    both = Both(CASES[name], tmp_path / "model", hardware)
    cells = zip(both.case.schedulers, itertools.cycle(both.case.scales), strict=False)
    differences = {cell: both.difference(*cell) for cell in cells}
    assert {cell: difference for cell, difference in differences.items() if difference >= TOLERANCE} == {}
