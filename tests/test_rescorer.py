"""Which images `verify --deep` scores again, and which differences it reports."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from engine.data.run.stored_plan import stored_plan
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.generation.rescorer import _choose, _differs
from engine.job.columns import BY_NAME
from tests.sleepy import run_sleepy


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run of five shards with four images each."""
    output = tmp_path_factory.mktemp("runs") / "run"
    run_sleepy(output, 2, LocalExecutor(1))
    return open_store(str(output))


@pytest.mark.parametrize("num_samples", [1, 3, 7, 20, 100])
def test_images_are_drawn_from_all_shards(store: Store, num_samples: int) -> None:
    """As many as are asked for, about equally many of each shard, none twice; the same ones every time."""
    job, plan = stored_plan(store)
    chosen = list(_choose(store, job, plan, num_samples))
    keys = [spec.key for spec, *_ in chosen]
    assert len(keys) == len(set(keys)) == min(num_samples, 20)
    assert all(image and record["key"] == spec.key for spec, image, record, *_ in chosen)
    shard_of = {sample.key: shard.number for shard in plan.shards() for sample in plan.samples(shard)}
    assert max(Counter(shard_of[key] for key in keys).values()) <= -(-num_samples // 5)
    assert [spec.key for spec, *_ in _choose(store, job, plan, num_samples)] == keys


def test_a_difference_in_either_direction_is_one_beyond_the_tolerance() -> None:
    """Of a score; of a class any other is."""
    tolerance = BY_NAME["risk"].tolerance
    for sign in (1, -1):
        assert _differs("risk", 1.0, 1.0 + sign * 2 * tolerance)
        assert not _differs("risk", 1.0, 1.0 + sign * tolerance / 2)
    assert _differs("predicted_class", 3, 4) and not _differs("predicted_class", 3, 3)


def test_shards_are_drawn_in_an_order_of_the_runs_own(store: Store, tmp_path: Path) -> None:
    """Not from the first one on, of which a few images would tell nothing of a large run."""
    job, plan = stored_plan(store)
    first = [next(iter(_choose(store, job, plan, 1)))[0].key]
    assert first != [sample.key for sample in plan.samples(plan.shard(0))][:1]
