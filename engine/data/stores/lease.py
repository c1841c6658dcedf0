"""The lease: one driver at a time works on an output, and a new one takes over from a dead one.

`_state/lease/000003.json` is the fourth driver's; the file is created if absent, so only one can be the fourth. Its
holder renews it; a holder that finds a later number has lost it. Expiry is judged by the wall clock first and then by
observation: a lease that changes while it is observed, for longer than its holder takes to renew it, is alive, whatever
the clocks say. The data do not depend on the lease: shards, records and rounds are created if absent, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from engine.data.stores.base import DRIVER_LOCK, LEASES, Store
from engine.errors import MAX_REASON_CHARS, OutputError, OwnedError, RiskforgeError
from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import MAX_RECORD_BYTES

LEASE_SECONDS = 60.0
# Renewals within the length of a lease.
RENEWALS = 4
# The latest time that a lease may state, in seconds since 1970: some centuries.
MAX_MOMENT = 2e10
# Longest wait for its release, where the network is broken.
RELEASE_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The holder of a lease.

    Attributes:
        token: drawn once per driver; distinguishes two on one machine.
        boot: boot identifier of the machine, empty where it is not known.
        process, process_start: identifier of the process, and its start time in ticks of the system.
        since, expires: seconds since 1970 on the holder's clock.
        length_seconds: time from a renewal to expiry.
        num_renewals: how often it was renewed.
        is_released: whether the holder has given it up.
    """

    token: str
    host: str
    boot: str
    process: int
    process_start: str
    since: float
    expires: float
    length_seconds: float
    num_renewals: int = 0
    is_released: bool = False

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self.since))
        return f"process {self.process} on {self.host}, since {since}"


class Lease:
    """A lease that this process holds; created by `hold`.

    Attributes:
        number: of the driver, among all that have worked on the output.
        name: of its file.
        token: of the driver, as in `Holder`.
    """

    def __init__(self, store: Store, number: int, holder: Holder) -> None:
        self.number, self.name = number, _name(number)
        self.token = holder.token
        self._store = store
        self._holder = holder
        self._lost = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def check(self) -> None:
        """Check that the lease is still held.

        Raises:
            OwnedError: another driver has taken the run over.
        """
        if self._lost:
            raise OwnedError(self._lost)

    def keep(self) -> None:
        """Renew the lease in the background, until `release`."""
        self._thread.start()

    def release(self) -> None:
        """Give the lease up; not worth an error or a long wait, as a lease expires by itself."""
        self._ended.set()
        self._thread.join(RELEASE_SECONDS)

    def renew(self) -> None:
        """Renew the lease, or find that it is lost."""
        latest = _latest(self._store)
        if latest is None or latest[0] != self.number or latest[1].token != self._holder.token:
            who = f" by {latest[1]}" if latest else ""
            self._lost = f"output {self._store.uri}: this run was taken over{who}; this driver stops"
            return
        self._holder = replace(
            self._holder,
            num_renewals=self._holder.num_renewals + 1,
            expires=time.time() + self._holder.length_seconds,
        )
        self._write(self._holder)

    def _keep(self) -> None:
        while not self._lost and not self._ended.wait(self._holder.length_seconds / RENEWALS):
            # A full disk is reported by other writers; the lease then expires. No error may end the renewing: a
            # running driver does not notice that its lease expires.
            with contextlib.suppress(Exception):
                self.renew()
        if not self._lost:
            with contextlib.suppress(RiskforgeError):
                self._write(replace(self._holder, is_released=True))

    def _write(self, holder: Holder) -> None:
        self._store.replace(_name(self.number), _bytes(holder))


@contextlib.contextmanager
def hold(
    store: Store,
    *,
    length_seconds: float = LEASE_SECONDS,
    notice: Callable[[str], None] = lambda text: None,
    wait: Callable[[float], object] = time.sleep,
) -> Iterator[Lease]:
    """Be the only driver that works on an output.

    Args:
        length_seconds: a driver that has not renewed its lease for so long counts as dead.
        notice: called with a text before waiting.
        wait: sleeps while an expired lease is observed.

    Raises:
        OwnedError: another driver is running, with its machine, process and start time.
    """
    own = _new_holder(length_seconds)
    # Where the file system has locks, a second driver on this machine is noticed at once, and so is a dead one.
    with store.try_lock(DRIVER_LOCK, str(own)) as other:
        if other:
            _refuse(store, other)
        lease = _take(store, own, notice, wait)
        lease.keep()
        try:
            yield lease
        finally:
            lease.release()


def read_holder(store: Store) -> Holder | None:
    """The current or last holder of the lease of an output; None where there was none."""
    latest = _latest(store)
    return latest[1] if latest else None


def is_alive(holder: Holder) -> bool:
    """Whether a holder is running, by its lease and this machine's clock."""
    return not holder.is_released and time.time() < holder.expires and not _is_dead_here(holder)


def _take(store: Store, own: Holder, notice: Callable[[str], None], wait: Callable[[float], object]) -> Lease:
    """Take the next number, once the latest holder has ended."""
    while True:
        latest = _latest(store)
        number = latest[0] + 1 if latest else 0
        if latest and not latest[1].is_released and not _is_dead_here(latest[1]):
            _outlive(store, latest[1], notice, wait)
        if store.publish(_name(number), _bytes(own)):
            store.remove_all(name for name in store.list(LEASES) if name < _name(number))
            return Lease(store, number, own)


def _outlive(store: Store, holder: Holder, notice: Callable[[str], None], wait: Callable[[float], object]) -> None:
    """Observe a lease that has expired by the clock, for longer than its holder would take to renew it.

    Raises:
        OwnedError: it has not expired, or was renewed.
    """
    left = holder.expires - time.time()
    # One that expires later than it could was written by another clock, or the clock was set back.
    if 0 < left <= holder.length_seconds:
        _refuse(store, f"{holder}; if it is dead, the output is available in {left:.0f} s")
    notice(f"waiting to see whether the previous driver is dead ({holder})")
    wait(2 * holder.length_seconds / RENEWALS)
    latest = read_holder(store)
    if latest is not None and latest != holder and not latest.is_released:
        _refuse(store, str(latest))


def _refuse(store: Store, who: str) -> None:
    raise OwnedError(
        f"output {store.uri}: another driver is running on it ({who}); let it finish or stop it, or choose another"
        " --output"
    )


def _latest(store: Store) -> tuple[int, Holder] | None:
    """The lease with the highest number, and its holder."""
    for name in reversed(store.list(LEASES)):
        try:
            return int(Path(name).stem), _holder(store.read(name, MAX_RECORD_BYTES))
        except OutputError as error:
            # Removed by a later driver, after it was listed.
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
        except (ValueError, TypeError) as error:
            reason = str(error)[:MAX_REASON_CHARS]
            raise OutputError(f"{store.address(name)}: is not the lease of a driver ({reason}); remove it") from None
    return None


def _holder(data: bytes) -> Holder:
    """A holder from its file.

    Raises:
        ValueError, TypeError: it has other fields, or fields of other types.
    """
    holder = Holder(**parse_json(data))
    kinds = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
    for field in fields(Holder):
        if type(value := getattr(holder, field.name)) not in kinds[str(field.type)]:
            raise ValueError(f"{field.name} is {value!r}")
    # Times that no clock shows: they are compared and printed.
    if not (
        0 <= holder.since < MAX_MOMENT and 0 <= holder.expires < MAX_MOMENT and 0 < holder.length_seconds < MAX_MOMENT
    ):
        raise ValueError("its times are out of range")
    return holder


def _new_holder(length_seconds: float) -> Holder:
    now = time.time()
    return Holder(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        boot=_read_line("/proc/sys/kernel/random/boot_id"),
        process=os.getpid(),
        process_start=_process_start(os.getpid()),
        since=now,
        expires=now + length_seconds,
        length_seconds=length_seconds,
    )


def _is_dead_here(holder: Holder) -> bool:
    """Whether a holder was a process of this boot of this machine that has ended."""
    if not holder.boot or (holder.host, holder.boot) != (
        socket.gethostname(),
        _read_line("/proc/sys/kernel/random/boot_id"),
    ):
        return False
    return _process_start(holder.process) != holder.process_start


def _process_start(process: int) -> str:
    """Start time of a process in ticks of the system; empty where there is no process, or it is not known."""
    stat = _read_line(f"/proc/{process}/stat")
    fields = stat.rpartition(")")[2].split()
    # A zombie counts as dead.
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _read_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _name(number: int) -> str:
    return f"{LEASES}/{number:06d}.json"


def _bytes(holder: Holder) -> bytes:
    return (json.dumps(asdict(holder)) + "\n").encode()
