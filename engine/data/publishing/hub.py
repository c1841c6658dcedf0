"""The Hub of a repository, by huggingface_hub: errors in one sentence, and retries of what may pass.

Endpoint and token come from the environment as that library reads them: `HF_ENDPOINT`, `HF_TOKEN` or `hf auth login`.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from engine.data.publishing.repository import Repository
from engine.errors import MAX_REASON_CHARS, CorruptShardError, JobError, RiskforgeError, StoreLostError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

Answer = TypeVar("Answer")

REPO_TYPE = "dataset"
MAIN = "main"
# Pauses before a request is tried again, beside the tries that the library makes of some.
WAITS = (1.0, 4.0, 15.0)
# A Hub that asks for a longer pause is left alone: the same command continues later.
MAX_WAIT = 300.0
# Without an answer for so long a connection counts as lost; the library would wait for ever.
TIMEOUT_SECONDS = 300.0
_TEMPORARY = frozenset([408, 412, 423, 425, 429])
_RESET = re.compile(r"t\s*=\s*(\d+)")
_XET_REMEDY = "; HF_HUB_DISABLE_XET=1 uploads without Xet"
_LOG_IN = "set HF_TOKEN to one with write access (huggingface.co/settings/tokens), or log in by `hf auth login`"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in the repository: of a large one the SHA-256 is known, of a small one what git calls it."""

    num_bytes: int
    sha256: str
    git_digest: str


def read_token() -> str | None:
    """The token of this user; None where there is none."""
    from huggingface_hub import get_token

    return get_token()


def is_offline() -> bool:
    """Whether the environment forbids requests."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def require_token(repository: Repository) -> str:
    """The token of this user.

    Raises:
        JobError: there is none, or the environment forbids requests.
    """
    if is_offline():
        raise JobError(f"--to {repository.uri}: HF_HUB_OFFLINE=1 forbids requests to the Hub; unset it to push")
    token = read_token()
    if not token:
        raise JobError(f"--to {repository.uri}: there is no token; {_LOG_IN}")
    if not (token.isascii() and token.isprintable()):
        raise JobError(f"--to {repository.uri}: the token has characters that no token has; {_LOG_IN}")
    return token


class Hub:
    """Requests about one branch of a repository.

    Args:
        revision: the branch; None for the main one.
        notify: is given a line when a request is tried again.
    """

    def __init__(
        self,
        repository: Repository,
        revision: str | None,
        token: str,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        from huggingface_hub import HfApi

        _prepare_library()
        self.repository, self.revision = repository, revision or MAIN
        self._token, self._notify = token, notify
        self._api: HfApi = HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None, token=token)
        self._names: dict[str, Any] = {"repo_id": repository.id, "repo_type": REPO_TYPE}

    @property
    def url(self) -> str:
        """The page of the repository."""
        tree = "" if self.revision == MAIN else f"/tree/{self.revision}"
        return f"{self._api.endpoint}/datasets/{self.repository.id}{tree}"

    def main(self) -> Hub:
        """The main branch of the same repository."""
        return Hub(self.repository, None, self._token, self._notify)

    # Repository ----------------------------------------------------------------------------------------------------

    def is_private(self) -> bool | None:
        """Whether the repository is private; None where there is none that the token may see."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def ask() -> bool | None:
            try:
                return bool(self._api.repo_info(**self._names).private)
            except RepositoryNotFoundError as error:
                # The library takes a refused token for a missing repository.
                if _status(error) == 401:
                    raise
                return None

        return self._patiently(ask)

    def create(self, *, private: bool) -> None:
        """Make the repository; one that was made by a request whose answer was lost is accepted."""
        from huggingface_hub.errors import HfHubHTTPError

        def ask() -> None:
            try:
                self._api.create_repo(**self._names, private=private)
            except HfHubHTTPError as error:
                if _status(error) != 409:
                    raise

        self._patiently(ask)

    def has_branch(self) -> bool:
        """Whether the branch is there."""
        if self.revision == MAIN:
            return True
        refs = self._patiently(lambda: self._api.list_repo_refs(**self._names))
        return any(branch.name == self.revision for branch in refs.branches)

    def create_branch(self) -> None:
        """Make the branch, from the main one."""
        self._patiently(lambda: self._api.create_branch(**self._names, branch=self.revision, exist_ok=True))

    # Files ---------------------------------------------------------------------------------------------------------

    def files(self) -> dict[str, RemoteFile]:
        """The files of the branch by name."""

        def ask() -> dict[str, RemoteFile]:
            tree = self._api.list_repo_tree(**self._names, revision=self.revision, recursive=True)
            return {entry.path: _remote(entry) for entry in tree if hasattr(entry, "blob_id")}

        return self._patiently(ask)

    def files_of(self, names: Sequence[str]) -> dict[str, RemoteFile]:
        """Those of some names that are in the branch."""

        def ask() -> dict[str, RemoteFile]:
            infos = self._api.get_paths_info(**self._names, paths=list(names), revision=self.revision)
            return {info.path: _remote(info) for info in infos if hasattr(info, "blob_id")}

        return self._patiently(ask)

    def read(self, name: str) -> bytes:
        """The content of a small file of the branch."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(**self._names, filename=name, revision=self.revision, endpoint=self._api.endpoint)

        def ask() -> bytes:
            answer = get_session().get(url, headers=build_hf_headers(token=self._token))
            hf_raise_for_status(answer)
            return bytes(answer.content)

        return self._patiently(ask)

    def check_card(self, card: str) -> None:
        """Refuse a card whose header the Hub does not take, before anything is sent.

        Raises:
            JobError: with what is wrong.
        """
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        asked = {"content": card, "repoType": REPO_TYPE}

        def ask() -> list[str]:
            headers = build_hf_headers(token=self._token)
            answer = get_session().post(f"{self._api.endpoint}/api/validate-yaml", json=asked, headers=headers)
            if answer.status_code == 400:
                return [str(error.get("message")) for error in answer.json().get("errors", [])] or ["no reason given"]
            hf_raise_for_status(answer)
            return []

        if problems := self._patiently(ask):
            raise JobError(
                f"RUN: README.md: the Hub refuses its header ({'; '.join(problems)}); correct it, and push again"
            )

    def upload(self, additions: list[CommitOperationAdd]) -> None:
        """Upload the content of files that a commit will name."""
        # Equal ones after the first, which the Hub has then: the library would send each of them.
        firsts = {addition.upload_info.sha256: addition for addition in reversed(additions)}
        others = [addition for addition in additions if firsts[addition.upload_info.sha256] is not addition]
        for part in (list(firsts.values()), others):
            self._patiently(functools.partial(self._upload, part))

    def _upload(self, additions: list[CommitOperationAdd]) -> None:
        if additions:
            self._api.preupload_lfs_files(**self._names, additions=additions, revision=self.revision)

    def commit(
        self, operations: Sequence[CommitOperationAdd | CommitOperationDelete], message: str, description: str
    ) -> None:
        """Make a commit, in one try: after a failed one the branch may have it.

        Raises:
            StoreLostError: the Hub did not answer, or cannot take it now.
        """
        self._once(
            lambda: self._api.create_commit(
                **self._names,
                operations=operations,
                commit_message=message,
                commit_description=description,
                revision=self.revision,
            )
        )

    def use_lfs_where_needed(self) -> None:
        """Upload by Git LFS where this Hub does not speak the Xet protocol, which the library takes for granted."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers

        if constants.HF_HUB_DISABLE_XET:
            return
        url = f"{self._api.endpoint}/api/datasets/{self.repository.id}/xet-write-token/{MAIN}"
        headers = build_hf_headers(token=self._token)
        answer = self._patiently(lambda: get_session().get(url, headers=headers))
        if answer.status_code not in (200, 401, 403):
            constants.HF_HUB_DISABLE_XET = True

    # Errors --------------------------------------------------------------------------------------------------------

    def _patiently(self, ask: Callable[[], Answer]) -> Answer:
        """The answer to a request that can be repeated, after several tries where that may help."""
        for wait in WAITS:
            try:
                return self._once(ask)
            except HubBusyError as error:
                self.pause(error, wait)
        return self._once(ask)

    def pause(self, error: HubBusyError, wait: float) -> None:
        """Wait before a request is tried again, as long as the Hub asks for.

        Raises:
            HubBusyError: that is too long.
        """
        wait = max(wait, error.wait_seconds)
        if wait > MAX_WAIT:
            raise error
        self._notify(f"the Hub: {error.reason}; again in {wait:.0f} s")
        time.sleep(wait)

    def _once(self, ask: Callable[[], Answer]) -> Answer:
        try:
            return ask()
        except RiskforgeError:
            raise
        except Exception as error:
            raise self._explained(error) from None

    def _explained(self, error: Exception) -> RiskforgeError:
        """An error of the library in one sentence, without the token."""
        cause = _root(error)
        status, reason = _status(cause), self._reason(cause)
        where = f"--to {self.repository.uri}"
        if status in _TEMPORARY or (status or 0) >= 500 or (status is None and _is_of_network(cause)):
            return HubBusyError(where, reason, _wanted_wait(cause))
        if status == 401:
            return JobError(f"{where}: the Hub refuses the token ({reason}); {_LOG_IN}")
        if status in (402, 403):
            return JobError(
                f"{where}: the token may not do this ({reason}); give HF_TOKEN one with write access to"
                f" '{self.repository.owner}', or push to a user or organization of yours"
            )
        if status == 404:
            return JobError(
                f"{where}: the Hub has no such repository or branch, or hides it from this token ({reason})"
            )
        if status == 413:
            return JobError(f"{where}: too large for the Hub ({reason}); use fewer samples per shard")
        if status is None and isinstance(cause, FileNotFoundError | PermissionError):
            return CorruptShardError(
                f"RUN: a file cannot be read ({reason}); `riskforge verify` reports what is damaged"
            )
        return JobError(f"{where}: the Hub refuses this ({reason})")

    def _reason(self, error: Exception) -> str:
        status, said = _status(error), getattr(error, "server_message", None)
        text = str(said or error).strip() or type(error).__name__
        if _is_of_xet(error):
            text = f"{text[: MAX_REASON_CHARS - len(_XET_REMEDY)]}{_XET_REMEDY}"
        line = " ".join(text.split()).replace(self._token, "***")[:MAX_REASON_CHARS]
        if status is None or line.startswith(str(status)):
            return line
        return f"{status}: {line}" if said else f"{status} {getattr(error.response, 'reason_phrase', '')}".strip()  # type: ignore[attr-defined]


class HubBusyError(StoreLostError):
    """The Hub does not answer, or not now; what is there stays, and the same command continues.

    Attributes:
        reason: of the last try.
        wait_seconds: how long the Hub asks to wait; 0 where it does not.
    """

    def __init__(self, where: str, reason: str, wait_seconds: float = 0.0) -> None:
        super().__init__(
            f"{where}: the Hub does not answer ({reason}); what is there stays, the same command continues"
        )
        self.reason, self.wait_seconds = reason, wait_seconds


@functools.cache
def _prepare_library() -> None:
    """Once: silence the library's bars and warnings, and give its connections an end."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import disable_progress_bars, logging
    from huggingface_hub.utils._http import default_client_factory

    def make_client() -> Any:
        client = default_client_factory()
        client.timeout = TIMEOUT_SECONDS
        return client

    disable_progress_bars()
    logging.set_verbosity_error()
    set_client_factory(make_client)


def _remote(entry: Any) -> RemoteFile:
    return RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else "", entry.blob_id)


def _root(error: Exception) -> Exception:
    """The error that the library's own one reports: of an upload in one of its threads."""
    while type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: Exception) -> int | None:
    """The status of the answer that an error is about; None where there was no answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_of_network(error: Exception) -> bool:
    """Whether a connection failed: by the classes of whichever library of HTTP is below, or of the Xet protocol."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    names = {base.__name__ for base in type(error).__mro__}
    if names & {"UnsupportedProtocol", "LocalProtocolError", "InvalidURL"}:
        return False
    return "TransportError" in names or _is_of_xet(error)


def _is_of_xet(error: Exception) -> bool:
    """Whether an error is of hf_xet, which raises plain ones and tries again itself what may pass at once."""
    return type(error) is RuntimeError or type(error).__module__.partition(".")[0] == "hf_xet"


def _wanted_wait(error: Exception) -> float:
    """Seconds that the Hub asks to wait, by its headers."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    after = str(headers.get("Retry-After", ""))
    if after.isdigit():
        return float(after)
    reset = _RESET.search(str(headers.get("ratelimit", ""))) if _status(error) == 429 else None
    return float(reset[1]) if reset else 0.0
