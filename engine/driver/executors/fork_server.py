"""The fork server: a process that imports the libraries once, and forks workers that share them.

Imports are nearly all of a worker's start. The server has one thread and starts no CUDA, so that a fork of it is in the
state of a process that has just imported the same. An actor asks for a worker and talks to it (`forked_host`). No
process outlives the one that needs it, however that ends:

- the driver: the server's standard input ends, and so does the server;
- the server: the kernel kills its workers, whose actors see their connections end;
- an actor: the server sees its connection end and kills its worker;
- a worker: the server sees its process end and closes the connection, and the actor ends.

For Linux. Where there is no server, or none any more, actors build workers in their own processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from engine.driver.executors.forked_host import serve_worker
from engine.models.library_imports import deferring

# What every worker imports; what else the models of a job need, workers import themselves. Not pyarrow, whose allocator
# starts a thread.
LIBRARIES = (
    "engine.generation.generator",
    "engine.generation.worker",
    "engine.models.pipelines.stable_diffusion",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.schedulers.scheduling_ddim",
    "transformers.models.auto.modeling_auto",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
)
_START = f"import json, sys; sys.path[:], *more = json.loads(sys.argv[1]); import {__name__} as s; s.serve(*more)"
# Of the first byte of an actor, which it sends as soon as it is connected.
_REQUEST_SECONDS = 5.0
_STDIN = 0
_PR_SET_PDEATHSIG = 1


class ForkServer:
    """A server that runs until it is closed or the driver ends.

    Args:
        libraries: modules that it imports.

    Attributes:
        address: the path of its socket, in a folder that only this user can enter; empty if there is no server.

    Side effects: starts a process and makes a temporary folder.
    """

    def __init__(self, libraries: Sequence[str] = LIBRARIES) -> None:
        self.address = ""
        self._folder = ""
        self._process: subprocess.Popen[bytes] | None = None
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                self._start(libraries)

    def close(self) -> None:
        """End the server and its workers; once more does nothing."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, libraries: Sequence[str]) -> None:
        self._folder = tempfile.mkdtemp(prefix="riskforge-")
        address = f"{self._folder}/fork"
        with socket.socket(socket.AF_UNIX) as listener:
            # Bound here: actors may connect before the server has imported anything.
            listener.bind(address)
            listener.listen()
            arguments = json.dumps([sys.path, listener.fileno(), *libraries])
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                # A worker on a CPU has one thread, and libraries start theirs when they are imported.
                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,
            )
        self.address = address


def serve(descriptor: int, *libraries: str) -> None:
    """Import the libraries, then fork a worker for each connection until standard input ends.

    Args:
        descriptor: of a socket that listens, in a folder that is removed at the end.
        libraries: modules.
    """
    with socket.socket(fileno=descriptor) as listener:
        folder = Path(listener.getsockname()).parent
        try:
            _import(libraries)
            # A lock that another thread holds at a fork is never released in the child.
            if len(list(Path("/proc/self/task").iterdir())) == 1:
                _Server(listener).run()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _import(libraries: Sequence[str]) -> None:
    with deferring():
        for name in libraries:
            importlib.import_module(name)
    # A collection in a worker would otherwise write into all of these objects, and so copy their memory.
    gc.collect()
    gc.freeze()


class _Worker(NamedTuple):
    """A forked process.

    Attributes:
        number: its id.
        process: descriptor that is readable when it has ended.
        connection: to its actor, which it shares with the server.
    """

    number: int
    process: int
    connection: socket.socket


class _Server:
    """Forks workers and ends them, in one thread, by the kernel's signs alone."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        # Each by both of its descriptors.
        self._workers: dict[int, _Worker] = {}
        self._poll = select.poll()

    def run(self) -> None:
        """Serve until standard input ends."""
        self._poll.register(_STDIN, select.POLLIN)
        self._poll.register(self._listener, select.POLLIN)
        while True:
            # One at a time: the descriptor of the next one may be closed by then, and be another's.
            descriptor, _ = self._poll.poll()[0]
            if descriptor == _STDIN:
                return
            if descriptor == self._listener.fileno():
                self._accept()
            else:
                self._end(self._workers[descriptor])

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(_REQUEST_SECONDS)
        try:
            _, output, *_ = socket.recv_fds(connection, 1, 2)
        except OSError:
            output = []
        connection.settimeout(None)
        if output:
            self._fork(connection, output)
        else:
            connection.close()

    def _fork(self, connection: socket.socket, output: list[int]) -> None:
        server = os.getpid()
        if not (number := os.fork()):
            self._become_worker(connection, output, server)
        for descriptor in output:
            os.close(descriptor)
        worker = _Worker(number, os.pidfd_open(number), connection)
        self._workers |= {worker.process: worker, connection.fileno(): worker}
        self._poll.register(worker.process, select.POLLIN)
        # Whether the actor is gone, which is always reported; what it sends is for the worker.
        self._poll.register(connection, 0)

    def _become_worker(self, connection: socket.socket, output: list[int], server: int) -> None:
        """In the fork, which never returns; it writes to the output and the errors of its actor."""
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != server:
                return
            for number, descriptor in enumerate([os.open(os.devnull, os.O_RDONLY), *output]):
                os.dup2(descriptor, number)
                os.close(descriptor)
            # An actor would not see the end of its worker while another one holds the connection, too.
            for worker in set(self._workers.values()):
                os.close(worker.process)
                worker.connection.close()
            self._listener.close()
            serve_worker(Connection(connection.detach()))
        except EOFError:
            pass
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)

    def _end(self, worker: _Worker) -> None:
        """End and reap a worker that has lost its actor, or has ended."""
        signal.pidfd_send_signal(worker.process, signal.SIGKILL)
        os.waitpid(worker.number, 0)
        for descriptor in (worker.process, worker.connection.fileno()):
            self._poll.unregister(descriptor)
            del self._workers[descriptor]
        os.close(worker.process)
        worker.connection.close()
