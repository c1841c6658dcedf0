"""What a folder of images is: a run, tars, parquet files, or one folder for each class; and every file in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from engine.data.images.class_folders import ClassReader
from engine.data.images.decode import EXTENSIONS
from engine.data.images.file_tree import Entry, list_files
from engine.data.images.findings import ImageSource, Unusable, unusable
from engine.data.images.ignored import why_ignored
from engine.data.images.labelling import Labelling
from engine.data.images.listings import NAMES, Listings, key_of
from engine.data.images.parquet_files import has_images, parquet
from engine.data.images.run_surplus import ROWS, SHARDS, SURPLUS
from engine.data.images.splits import (
    card_class_names,
    configurations_of,
    group_by_split,
    is_same_split,
    is_several,
    keyword_in,
    read_splits,
    split_of,
)
from engine.data.images.webdataset_tars import webdataset
from engine.errors import JobError

KIND = "a folder by class"
# At the top of a folder that the engine finished.
_MARKS = ("manifest.json", "_SUCCESS")
_STATE = "_state"
# Folders of a run with other scores of its images, and answers of people about them.
_INTERNAL = (_STATE, "rescored", "_review")
# Of a repository in the cache of `huggingface_hub`.
BLOBS, SNAPSHOTS = "blobs", "snapshots"
_MAX_GIVEN = 3
_DATA = EXTENSIONS | {"tar", "parquet"}
# Written beside tars by the engine or by the tools that read them.
_INDEXES = frozenset({"wids.json", "_info.json", SURPLUS})


def open_folder(root: Path, labels: tuple[str, ...], option: str, address: str, split: str = "") -> ImageSource:
    """The images in a folder.

    Tars come before parquet, because a run has both; a folder without either is one of classes. Files of another kind
    are named, and not read.

    Args:
        option, address: where the user gave the folder, for messages.
        split: of tars or parquet files, the split to read; all where empty.

    Raises:
        JobError: it holds several splits, or not the one that is asked for.
        OSError: it cannot be listed.
    """
    return _Folder(root, labels, option, address, split).source()


class _Folder:
    """A folder that is being opened."""

    def __init__(self, root: Path, labels: tuple[str, ...], option: str, address: str, split: str) -> None:
        self._root, self._labels, self._split = root, labels, split
        self._option, self._address = option, address.rstrip("/") or address
        entries = list_files(root)
        self._check_cache(entries)
        self._is_own = _is_own(entries)
        self._unread: list[Unusable] = []
        self._entries = [one for one in entries if self._is_data(one)]

    def source(self) -> ImageSource:
        """What is read of it, and what is not."""
        tars = [one for one in self._entries if one.extension == "tar"]
        if self._is_own and (shards := [one for one in tars if one.parts[:-1] == (SHARDS,)]):
            return self._of_run(shards)
        if tars:
            return self._of_containers(tars, "tars", self._open_tars)
        tables = [one for one in self._entries if one.extension == "parquet" and one.name not in NAMES]
        with_images = [one for one in tables if has_images(self._root / one.place)]
        is_bare = not any(one.extension in EXTENSIONS for one in self._entries)
        if with_images or (tables and is_bare):
            return self._of_containers(with_images or tables, "parquet files", self._open_tables)
        if self._split:
            raise JobError(f"{self._option}: there is no '{self._address}'")
        return self._of_classes()

    def _check_cache(self, entries: Sequence[Entry]) -> None:
        """Refuse a repository as the hub's cache has it: every file is in it by its content, and again by its name.

        Raises:
            JobError: it is one.
        """
        snapshots = sorted({one.parts[1] for one in entries if one.parts[0] == SNAPSHOTS and len(one.parts) > 2})
        if snapshots and any(one.parts[0] == BLOBS for one in entries):
            given = " or ".join(f"'{self._address}/{SNAPSHOTS}/{one}'" for one in snapshots[:_MAX_GIVEN])
            raise JobError(f"{self._option}: '{self._address}' is a repository in the hub's cache; give {given}")

    def _is_data(self, entry: Entry) -> bool:
        """Whether a file is to be read; it is noted where it is not, unless it is the engine's own."""
        is_engines = self._is_own and (
            entry.parts[0] in _INTERNAL
            or (entry.extension not in _DATA and (len(entry.parts) == 1 or entry.parts[0] == SHARDS))
        )
        reason = entry.problem or why_ignored(entry.place)
        if reason and not is_engines:
            self._unread.append(unusable(entry.place, reason))
        return not reason and not is_engines

    def _of_run(self, shards: Sequence[Entry]) -> ImageSource:
        """The shards of a run; images beside them are named."""
        known = set(shards)
        others = [one for one in self._entries if one not in known and one.extension != "parquet"]
        home = self._root / SHARDS
        source = webdataset([self._root / one.place for one in shards], self._labels, home)
        return source.beside([*self._unread, *_beside(others, "the shards of a run")])

    def _of_containers(
        self, files: Sequence[Entry], what: str, read: Callable[[Sequence[Entry]], ImageSource]
    ) -> ImageSource:
        """Tars or parquet files of one split, with all else named."""
        chosen = self._of_one_split(files)
        source = read(chosen)
        if self._split:
            return source
        known, stems = set(files), {one.place.rpartition(".")[0] for one in files}
        others = [
            one
            for one in self._entries
            if one not in known
            and one.name not in _INDEXES
            and not (one.extension == "parquet" and one.place.rpartition(".")[0] in stems)
        ]
        left_out = sorted(known - set(chosen), key=lambda one: one.parts)
        unlisted = [unusable(one.place, "is in no split that the card (README.md) names") for one in left_out]
        return source.beside([*self._unread, *unlisted, *_beside(others, what)])

    def _of_one_split(self, files: Sequence[Entry]) -> list[Entry]:
        """The files of the split that is asked for, or of the only one.

        Raises:
            JobError: there are several, or not that one.
        """
        places = [one.place for one in files]
        listed = read_splits(self._root, places)
        groups = listed or group_by_split({one: split_of(one) for one in places})
        if self._split:
            chosen = [own for split, own in groups.items() if is_same_split(split, self._split)]
            if not chosen:
                raise JobError(f"{self._option}: there is no '{self._address}'")
            groups = {self._split: chosen[0]}
        if len(groups) > 1:
            self._refuse_splits(sorted(filter(None, groups)), groups.get("", [])[:1])
        split, chosen_places = next(iter(groups.items()))
        if split and not listed and (homes := configurations_of(chosen_places)):
            self._refuse_configurations(homes)
        return [one for one in files if one.place in chosen_places]

    def _refuse_splits(self, splits: Sequence[str], others: Sequence[str] = ()) -> None:
        given = " or ".join(f"'{self._address}/{one}'" for one in [*splits, *others])
        beside = f", and files of none, such as '{others[0]}'" if others else ""
        raise JobError(
            f"{self._option}: '{self._address}' holds the split{'s' if len(splits) > 1 else ''}"
            f" {', '.join(splits)}{beside}: they are read one at a time; give {given}"
        )

    def _refuse_configurations(self, homes: Sequence[str]) -> None:
        base = self._root.as_posix() if self._split else self._address
        given = " or ".join(f"'{base}/{one}'" if one else f"the files of '{base}' itself" for one in homes[:_MAX_GIVEN])
        raise JobError(
            f"{self._option}: '{self._address}' has the same files of one split in {len(homes)} folders, as"
            f" configurations of a data set have them: give {given}; or a folder with links to all of them"
        )

    def _open_tars(self, files: Sequence[Entry]) -> ImageSource:
        return webdataset([self._root / one.place for one in files], self._labels, self._root)

    def _open_tables(self, files: Sequence[Entry]) -> ImageSource:
        paths = [self._root / one.place for one in files]
        return parquet(paths, self._labels, card_class_names(self._root), self._root)

    def _of_classes(self) -> ImageSource:
        labelling, listings = Labelling(self._labels), self._listings()
        files = [one for one in self._entries if one.name not in NAMES or one.place in listings.problems]
        home = self._class_home(files, labelling)
        folders = {
            one.parts[len(home)] for one in files if one.parts[: len(home)] == home and len(one.parts) > len(home) + 1
        }
        labelling.settle(listings.texts() if listings.listed else folders)
        reader = ClassReader(self._root, home, labelling, listings)
        items = [partial(reader.read, one) for one in files]
        source = ImageSource(KIND, len(items), (partial(iter, items),))
        there = {key_of(one.place) for one in files}
        missing = [
            unusable(place, f"is listed in {listing}, and is not there")
            for place, (_, listing) in listings.listed.items()
            if place not in there
        ]
        return source.beside([*self._unread, *missing])

    def _listings(self) -> Listings:
        listings = Listings()
        class_names = card_class_names(self._root)
        for one in self._entries:
            if one.name in NAMES:
                listings.add(self._root, one.place, class_names)
        if self._is_own:
            # Without labels it holds the rows of a run.
            listings.problems.clear()
        return listings

    def _class_home(self, files: Sequence[Entry], labelling: Labelling) -> tuple[str, ...]:
        """The folder that holds the class folders: this one, or one below that is alone there and no class.

        Raises:
            JobError: there are folders of several splits.
        """
        home: tuple[str, ...] = ()
        while True:
            below = [one.parts[len(home) :] for one in files if one.parts[: len(home)] == home]
            folders = sorted({one[0] for one in below if len(one) > 1})
            self._check_splits(home, folders, below, labelling)
            inner = {folder for one in below for folder in one[1:-1]}
            is_home = len(folders) != 1 or labelling.is_label(folders[0])
            if is_home or not any(labelling.is_label(one) or keyword_in(one) for one in inner):
                return home
            home = (*home, folders[0])

    def _check_splits(
        self, home: tuple[str, ...], folders: Sequence[str], below: Sequence[tuple[str, ...]], labelling: Labelling
    ) -> None:
        """Refuse folders of several splits, above the class folders or in them."""
        splits = [one for one in folders if keyword_in(one) and not labelling.is_class(one)]
        if is_several(splits):
            self._refuse_splits(["/".join((*home, one)) for one in splits])
        inner = sorted({one[1] for one in below if len(one) > 2 and labelling.is_label(one[0])})
        within = [one for one in inner if keyword_in(one) and not labelling.is_class(one)]
        if is_several(within):
            raise JobError(
                f"{self._option}: '{self._address}' holds the splits {', '.join(within)} inside its class folders: they"
                " are read one at a time; give a folder with the classes of one split, which may be links"
            )


def _is_own(entries: Sequence[Entry]) -> bool:
    """Whether the engine wrote a folder: a run, finished or not, or an export."""
    has_shards = any(one.parts[0] == SHARDS and one.extension == "tar" for one in entries)
    there = {one.parts[0] for one in entries}
    return _STATE in there or there.issuperset(_MARKS) or (ROWS in there and has_shards)


def _beside(entries: Iterable[Entry], what: str) -> list[Unusable]:
    """Files of another kind than those that are read."""
    remedy = "; give its folder by itself"
    return [
        unusable(one.place, f"lies beside {what}, which are read{remedy if one.extension in _DATA else ''}")
        for one in entries
    ]
