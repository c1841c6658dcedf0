"""Ceph's RADOS Gateway, a real S3, where it is installed: `tools/gateway_study.py` in small."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tools import gateway_study
from tools.gateway_study import Place

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("radosgw") is None, reason="needs Ceph (tools/s3_gateway.py names its packages)"),
]


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """A gateway of its own; the path of a socket has to be short."""
    with tempfile.TemporaryDirectory(prefix="rgw-", dir="/tmp") as home, pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        folder = Path(home)
        with gateway_study.bucket(folder):
            yield Place(folder)


@pytest.mark.parametrize(
    "scenario",
    [
        gateway_study.conditions,
        gateway_study.two_drivers,
        partial(gateway_study.broken_network, seed=1),
        partial(gateway_study.killed_drivers, num_kills=2),
    ],
    ids=["conditions", "two-drivers", "broken-network", "killed-drivers"],
)
def test_what_the_study_finds_holds(place: Place, scenario: Callable[[Place], str]) -> None:
    """Each scenario raises where a run is not whole, or has other bytes than in a folder."""
    assert scenario(place)
