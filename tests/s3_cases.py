"""An S3 in this process for the tests of object stores: the server, a place on it, a run to compare with."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from engine.data.run.shards import SHARDS
from engine.data.stores.object_store import ObjectStore
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from tests.sleepy import run_sleepy, tars

BUCKET = "bucket"
COUNT = 2
NUM_SHARDS = 5


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 with one bucket, which the environment names."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    endpoint = "http://{}:{}".format(*moto.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        connected("unused").client.fs.call_s3("create_bucket", Bucket=BUCKET)
        yield endpoint
    moto.stop()


@pytest.fixture
def s3_store(s3_server: str, request: pytest.FixtureRequest) -> ObjectStore:
    """An empty place for a test."""
    return connected(request.node.name.replace("[", "-").replace("]", ""))


def connected(name: str) -> ObjectStore:
    found = open_store(f"s3://{BUCKET}/{name}")
    assert isinstance(found, ObjectStore)
    return found


def objects(s3_store: ObjectStore, folder: str = "") -> dict[str, bytes]:
    """Everything below a folder by its name, listed and read past the store's own methods."""
    keys = s3_store.client.fs.find(f"{BUCKET}/{s3_store.name}/{folder}")
    return {key.removeprefix(f"{BUCKET}/{s3_store.name}/"): s3_store.client.fs.cat_file(key) for key in keys}


@pytest.fixture(scope="module")
def local_tars(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tars of the same run in a folder."""
    output = tmp_path_factory.mktemp("local") / "run"
    run_sleepy(output, COUNT, LocalExecutor(2))
    return {f"{SHARDS}/{name}": data for name, data in tars(output).items()}
