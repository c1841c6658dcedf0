"""The address of a repository of data: `hf://datasets/USER/NAME`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.errors import JobError, first_line

FORM = "hf://datasets/USER/NAME"
# Kinds of repositories that are not for data.
_OTHER_KINDS = ("models", "spaces", "kernels", "buckets")
_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<path>.*?)/*", re.IGNORECASE)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What no name of a branch has, by the rules of git.
_UNUSABLE = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|(^|/)[.-]|[./]$|\.lock$|^/|^refs/")


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository of data on the Hub.

    Attributes:
        owner: user or organization.
    """

    owner: str
    name: str

    @property
    def id(self) -> str:
        """As the Hub's API has it."""
        return f"{self.owner}/{self.name}"

    @property
    def uri(self) -> str:
        """Its address."""
        return f"hf://datasets/{self.id}"


def parse_repository(text: str) -> Repository:
    """A repository from its address.

    Raises:
        JobError: it is of another form, of another kind, or has an impossible name.
    """
    if page := _PAGE.fullmatch(text):
        raise JobError(f"--to {text}: is the address of a page; write hf://{page['path']}")
    scheme, separator, path = text.partition("://")
    if not separator or scheme.lower() != "hf":
        what = f"{scheme}:// is not supported" if separator else "has no scheme"
        raise JobError(f"--to {text}: {what}; write {FORM}")
    kind, _, rest = path.rstrip("/").partition("/")
    if kind != "datasets":
        what = f"is a repository of {kind}" if kind in _OTHER_KINDS else "is a repository of models"
        raise JobError(f"--to {text}: {what}, and a run is data; write {FORM}")
    owner, _, name = rest.partition("/")
    if not owner or not name:
        raise JobError(f"--to {text}: lacks the user or organization, or the name; write {FORM}")
    if "/" in name:
        raise JobError(f"--to {text}: is a folder in a repository, which holds one data set; write {FORM}")
    _check_names(text, owner, name)
    return Repository(owner, name)


def _check_names(text: str, owner: str, name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(f"{owner}/{name}")
    except HFValidationError as error:
        raise JobError(f"--to {text}: is not a name on the Hub ({first_line(error)})") from None


def check_revision(revision: str | None) -> None:
    """Check the name of a branch; None stands for the repository's main one.

    Raises:
        JobError: nothing can be pushed to it.
    """
    if revision is None:
        return
    if _COMMIT.fullmatch(revision):
        raise JobError(f"--revision {revision}: is a commit, which nothing is added to; give a branch")
    if not revision or _UNUSABLE.search(revision):
        raise JobError(f"--revision {revision!r}: is not the name of a branch; write one such as `2026-11`")
