"""Runs on GCS: of a server in this process the requests of gcsfs are looked at."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import unquote

import pytest

from engine.data.run.verify import verify
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.errors import EXIT_OK, OutputError
from tests.conftest import REPOSITORY
from tests.gcs_server import FewWordsOfGcs
from tests.s3_cases import BUCKET, COUNT
from tests.sleepy import run_sleepy


def test_gcs_is_asked_to_create_if_absent(local_tars: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests of gcsfs: everything that is published goes out with the condition, and a refusal is understood."""
    FewWordsOfGcs.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FewWordsOfGcs) as gcs:
        threading.Thread(target=gcs.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{gcs.server_port}")
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        store = open_store(f"gs://{BUCKET}/x")
        assert store.publish("a", b"first") and store.publish("a", b"first") and not store.publish("a", b"other")
        uploads = [one for one in FewWordsOfGcs.asked if one.startswith("POST")]
        assert uploads and all("uploadType=multipart&ifGenerationMatch=0" in one for one in uploads)
        store.replace("a", b"other")
        assert "ifGenerationMatch" not in FewWordsOfGcs.asked[-1] and store.fetch("a").read_bytes() == b"other"
        assert run_sleepy(f"gcs://{BUCKET}/run", COUNT, LocalExecutor(2)).exit_code == EXIT_OK
        run = open_store(f"gs://{BUCKET}/run")
        assert not verify(run).findings and {name: run.read(name) for name in local_tars} == local_tars
        with pytest.raises(OutputError, match=r"^gs://nobody/x: there is no such bucket"):
            open_store("gs://nobody/x").is_there()
        gcs.shutdown()


def test_what_gcs_refuses_is_reported_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs logs what it raises with its traceback, and raises a bare ValueError for some."""

    class Refusing(FewWordsOfGcs):
        def do_GET(self) -> None:
            self.answer(400, json.dumps({"error": {"code": 400, "message": unquote(self.path.split("/")[4])}}).encode())

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as gcs:
        threading.Thread(target=gcs.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{gcs.server_port}")
        monkeypatch.setenv("NO_GCE_CHECK", "true")
        for bucket in ("invalid", "other"):
            error = error_of(f"gs://{bucket}/x")
            assert "\n" not in error and error.startswith(f"error: gs://{bucket}/x/_state/plan: the store refuses ("), (
                error
            )
        gcs.shutdown()


def error_of(*arguments: str, code: int = 2) -> str:
    """What `riskforge status` says of an address, in a process of its own, within seconds."""
    started = time.monotonic()
    command = [str(Path(sys.executable).with_name("riskforge")), "status", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr and not done.stdout, done
    assert time.monotonic() - started < 40
    return done.stderr.strip()


def test_what_gcsfs_logs_is_not_printed() -> None:
    """It logs every error with its traceback, and raises it as well."""
    program = "import logging; from engine.data.stores.opening import open_store; open_store('gs://b/x').client.fs;"
    program += "logging.getLogger('gcsfs').error('out of retries')"
    emulated = os.environ | {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=emulated, capture_output=True, text=True, check=True
    )
    assert not done.stderr


def test_a_file_of_credentials_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of TMPDIR."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    monkeypatch.setattr("tempfile.tempdir", "/elsewhere")
    with pytest.raises(OutputError) as caught:
        open_store("gs://bucket/x").list()
    error = f"gs://bucket/x: the library reads {tmp_path}: Is a directory; correct GOOGLE_APPLICATION_CREDENTIALS"
    assert str(caught.value) == error
