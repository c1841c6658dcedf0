"""Pushing a run or an export to a repository: data first, in commits of some files, then what describes it in one.

What is there already is not sent again: files by size and checksum, and the content of files whose commit is lacking
because the Hub knows it. So the same command continues after a broken push.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import engine
from engine.data.publishing.contents import Contents, PushedFile, read_contents
from engine.data.publishing.differences import Differences, check_differences, find_differences, is_equal
from engine.data.publishing.hub import WAITS, Hub, HubBusyError, is_offline, read_token, require_token
from engine.data.publishing.limits import MAX_COMMIT_BYTES, files_in_commit, limit_warnings
from engine.data.publishing.repository import Repository, check_revision, parse_repository
from engine.data.run.file_names import CARD
from engine.data.run.foreign_files import list_names
from engine.data.run.shards import file_digest
from engine.data.stores.file_errors import explained
from engine.data.stores.opening import open_store
from engine.data.stores.process_folder import ProcessFolder
from engine.errors import CorruptShardError, JobError, OutputError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

# Uploaded together: copies of so many objects stay on the disk at a time.
FILES_TOGETHER = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """What was asked for.

    Attributes:
        to: address of the repository.
        public: whether a repository that is made is public.
        revision: branch; None for the main one.
        message: of the commits; empty for the default.
        overwrite: whether content of others under names of this data set is replaced.
        with_report: whether `report.html` is pushed.
    """

    to: str
    public: bool = False
    revision: str | None = None
    message: str = ""
    overwrite: bool = False
    with_report: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """A push, done or planned.

    Attributes:
        url: page of the repository; empty where the Hub was not asked.
        private: whether the repository is private, or would be.
        is_new: whether it was made, or would be; None where the Hub was not asked.
        notices: what the user should know, in words.
        unknown: why the repository was not looked at; empty where it was.
    """

    repository: Repository
    revision: str
    url: str
    private: bool
    is_new: bool | None
    contents: Contents
    differences: Differences
    notices: tuple[str, ...]
    unknown: str = ""


class Sent(NamedTuple):
    """How much of a push was sent, of how much."""

    num_files: int
    total_files: int
    num_bytes: int
    total_bytes: int

    def plus(self, files: Sequence[PushedFile]) -> Sent:
        """After these files, too; what is sent again after an error counts once at the end."""
        num_files = min(self.total_files, self.num_files + len(files))
        num_bytes = min(self.total_bytes, self.num_bytes + sum(file.num_bytes for file in files))
        return self._replace(num_files=num_files, num_bytes=num_bytes)


def push(
    run: str,
    options: PushOptions,
    advance: Callable[[Sent], None] = lambda sent: None,
    notify: Callable[[str], None] = lambda text: None,
) -> Push:
    """Push a complete run or export.

    Args:
        run: its folder or address.
        advance: progress callback.
        notify: is given each notice before anything is sent, and a line where the Hub is asked again.

    Raises:
        JobError: an option is wrong, the Hub refuses, or the repository holds content of others.
        OutputError: the run is not complete.
        CorruptShardError: it is damaged.
        StoreLostError: the Hub does not answer; the same command continues.
    """
    repository = _checked(options)
    token = require_token(repository)
    with _work_folder() as work:
        contents = read_contents(open_store(run), work, with_report=options.with_report)
        hub = Hub(repository, options.revision, token, notify)
        plan = _compared(contents, hub, options)
        check_differences(plan.differences, _where(repository, options))
        for file in contents.closing:
            if file.name == CARD and CARD in plan.differences.names and isinstance(file.content, bytes):
                hub.check_card(file.content.decode())
        for notice in plan.notices:
            notify(notice)
        if plan.is_new:
            hub.create(private=plan.private)
        if not hub.has_branch():
            hub.create_branch()
        _Upload(plan, hub, options, advance).run()
        return plan


def preview(run: str, options: PushOptions, notify: Callable[[str], None] = lambda text: None) -> Push:
    """What a push would do; nothing is written, and without token or network the repository is not looked at.

    Raises:
        RiskforgeError: as `push`, as far as that can be told.
    """
    repository = _checked(options)
    token = read_token()
    unknown = "HF_HUB_OFFLINE=1 is set" if is_offline() else "" if token else "there is no token (HF_TOKEN)"
    with _work_folder() as work:
        contents = read_contents(open_store(run), work, with_report=options.with_report)
        if unknown or not token:
            return Push(
                repository=repository, revision=options.revision or "main", url="", private=not options.public,
                is_new=None, contents=contents, differences=Differences(missing=list(contents.files)),
                notices=tuple(_notices(contents, Differences())), unknown=unknown,
            )  # fmt: skip
        plan = _compared(contents, Hub(repository, options.revision, token, notify), options)
        check_differences(plan.differences, _where(repository, options))
        return plan


@contextlib.contextmanager
def _work_folder() -> Iterator[Path]:
    """A folder for files that are made for the push; that of a process which was killed goes with the next one."""
    folder = ProcessFolder("push")
    try:
        yield folder.path()
    finally:
        folder.release()


def _checked(options: PushOptions) -> Repository:
    repository = parse_repository(options.to)
    check_revision(options.revision)
    if options.message and not options.message.strip():
        raise JobError("--message: is empty; write what is pushed, or omit it")
    return repository


def _where(repository: Repository, options: PushOptions) -> str:
    return f"{repository.uri} (branch {options.revision})" if options.revision else repository.uri


def _compared(contents: Contents, hub: Hub, options: PushOptions) -> Push:
    """What a push would change in the repository."""
    is_private = hub.is_private()
    is_new = is_private is None
    # A new branch begins with the files of the main one.
    source = hub if is_new or hub.has_branch() else hub.main()
    remote = {} if is_new else source.files()
    differences = find_differences(contents, remote, source.read, overwrite=options.overwrite)
    private = not options.public if is_private is None else is_private
    notices = [*_privacy(is_private, options), *_notices(contents, differences)]
    return Push(
        repository=hub.repository, revision=hub.revision, url=hub.url, private=private, is_new=is_new,
        contents=contents, differences=differences, notices=tuple(notices),
    )  # fmt: skip


def _privacy(is_private: bool | None, options: PushOptions) -> Iterator[str]:
    if is_private is False and not options.public:
        yield f"{options.to} is public already and stays so: everybody can read what is pushed"
    if is_private and options.public:
        yield f"{options.to} is private and stays so; its settings on the Hub make it public"


def _notices(contents: Contents, differences: Differences) -> Iterator[str]:
    yield from limit_warnings(contents)
    if contents.left_out:
        yield f"not pushed of {contents.store.uri}: {list_names(contents.left_out)}"
    if differences.kept:
        yield f"files of others in the repository, which stay: {list_names(differences.kept)}"
    if differences.stale:
        yield f"files of the earlier push that this data set does not have, which go: {list_names(differences.stale)}"


class _Upload:
    """The commits of a push."""

    def __init__(self, plan: Push, hub: Hub, options: PushOptions, advance: Callable[[Sent], None]) -> None:
        self._plan, self._hub, self._options, self._advance = plan, hub, options, advance
        self._contents = plan.contents
        pending = [*plan.differences.missing, *plan.differences.changed]
        self._sent = Sent(0, len(pending), 0, sum(file.num_bytes for file in pending))

    def run(self) -> None:
        """Send what differs, and check that the repository has it then."""
        names = self._plan.differences.names
        data = [file for file in self._contents.data if file.name in names]
        closing = [file for file in self._contents.closing if file.name in names]
        if not data and not closing and not self._plan.differences.stale:
            return
        self._hub.use_lfs_where_needed()
        batches = list(commit_batches(data))
        for number, batch in enumerate(batches):
            self._commit(batch, [], f"{number + 1} of {len(batches) + 1}")
        self._commit(closing, self._plan.differences.stale, f"{len(batches) + 1} of {len(batches) + 1}")
        self._check()

    def _commit(self, files: Sequence[PushedFile], stale: Sequence[str], which: str) -> None:
        """One commit, tried again with what the branch then lacks: a lost answer may have been that of a success."""
        for wait in (*WAITS, None):
            try:
                self._try(files, stale, which)
                return
            except HubBusyError as error:
                if wait is None:
                    raise
                self._hub.pause(error, wait)
            there = self._hub.files_of([*(file.name for file in files), *stale])
            files = [
                file for file in files if file.name not in there or not is_equal(self._contents, file, there[file.name])
            ]
            stale = [name for name in stale if name in there]
            if not files and not stale:
                return

    def _try(self, files: Sequence[PushedFile], stale: Sequence[str], which: str) -> None:
        from huggingface_hub import CommitOperationDelete

        additions = []
        for start in range(0, len(files), FILES_TOGETHER):
            group = files[start : start + FILES_TOGETHER]
            added = self._additions(group)
            self._hub.upload(added)
            additions += added
            self._sent = self._sent.plus(group)
            self._advance(self._sent)
        message = self._options.message.strip() or f"Push {self._contents.name} ({which})"
        deletions = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale]
        self._hub.commit([*deletions, *additions], message, f"riskforge {engine.__version__}, commit {which}")

    def _additions(self, files: Sequence[PushedFile]) -> list[CommitOperationAdd]:
        """What is uploaded of some files, each compared with its recorded checksum."""
        from huggingface_hub import CommitOperationAdd

        fetched = self._contents.store.fetch_each(file.name for file in files if file.content is None)
        additions = []
        for file in files:
            content = file.content
            if content is None:
                content = next(fetched)
                self._check_file(file, content)
            additions.append(CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=content))
        return additions

    def _check_file(self, file: PushedFile, path: Path) -> None:
        """Refuse a file that is not as it was recorded or listed.

        Raises:
            CorruptShardError: it differs.
            OutputError: it cannot be read.
        """
        where = self._contents.store.address(file.name)
        if not path.is_file():
            raise CorruptShardError(f"{where}: is missing; `riskforge verify` reports what is damaged")
        with explained(path):
            is_whole = path.stat().st_size == file.num_bytes
            is_whole = is_whole and (not file.sha256 or file_digest(path, "sha256") == file.sha256)
        if not is_whole:
            raise CorruptShardError(
                f"{where}: is not the file that was committed (checksum or size), and is not pushed;"
                f" `riskforge verify {self._contents.store.uri}` reports what is damaged"
            )

    def _check(self) -> None:
        """Refuse a repository that left something out, as by a `.gitignore` in it."""
        there = self._hub.files()
        lost = [
            file.name
            for file in self._contents.files
            if file.name not in there or there[file.name].num_bytes != file.num_bytes
        ]
        if lost:
            raise OutputError(
                f"--to {self._plan.repository.uri}: does not have {list_names(lost)} after the push; another push"
                " replaced them, or a .gitignore there leaves them out: correct that, and push again"
            )


def commit_batches(files: Sequence[PushedFile]) -> Iterator[list[PushedFile]]:
    """The files of each commit."""
    most, batch, num_bytes = files_in_commit(len(files)), list[PushedFile](), 0
    for file in files:
        if batch and (len(batch) == most or num_bytes + file.num_bytes > MAX_COMMIT_BYTES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(file)
        num_bytes += file.num_bytes
    if batch:
        yield batch
