"""Offsets of samples in tars: the first of equal keys counts, and missing ones are reported."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from engine.data.run.shards import read_shard
from engine.data.run.tar_index import SamplePlaces, TarReader, index_tars
from engine.data.stores.base import StoredFile
from engine.data.stores.opening import open_store
from engine.errors import CorruptShardError
from tests.run_cases import commit_rest, open_case


@pytest.fixture
def tars(tmp_path: Path) -> list[StoredFile]:
    """The first two shards of a run, the second of which holds the samples of the first once more."""
    store, plan, _ = open_case(tmp_path)
    commit_rest(store, plan)
    first = "shards/demo-000000.tar"
    store.replace("shards/copy.tar", store.read(first))
    return [StoredFile(open_store(str(tmp_path)), name) for name in (first, "shards/copy.tar")]


def test_the_first_of_equal_keys_counts(tars: list[StoredFile]) -> None:
    samples = list(read_shard(tars[0].fetch()))
    places = SamplePlaces(key for key, *_ in samples)
    for other in (0, 1):
        for key, place in index_tars(tars, [key for key, *_ in samples]).items():
            places.add(key, place._replace(image=place.image._replace(tar=other)))
    assert places.num_missing == 0 and {places[key].image.tar for key in places} == {0}
    reader = TarReader(tars)
    for copy in (reader, pickle.loads(pickle.dumps(reader))):
        assert [copy.read(places[key].image) for key, *_ in samples] == [image for _, image, *_ in samples]
        copy.close()


def test_a_key_that_is_in_no_tar_is_reported(tars: list[StoredFile]) -> None:
    with pytest.raises(CorruptShardError, match=r"no tar has the image of 'nowhere' \(1 are missing\)"):
        index_tars(tars, ["nowhere"])
