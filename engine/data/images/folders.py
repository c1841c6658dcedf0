"""What a folder of images is: a run, tars, parquet files, or one folder for each class; and every file in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from engine.data.images.class_folders import ClassReader, context_folder
from engine.data.images.decode import EXTENSIONS
from engine.data.images.file_tree import Entry, list_files
from engine.data.images.ignored import why_ignored
from engine.data.images.image_source import ImageSource, Unusable, unusable
from engine.data.images.label_files import LABEL_MAP, read_label_map
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
from engine.job.records import STARTS, TWINS

KIND = "a folder by class"
# At the top of a folder that the engine finished.
_MARKS = ("manifest.json", "_SUCCESS")
_STATE = "_state"
# Folders of a run with second images of its samples, other scores of its images, and reviews of them.
_INTERNAL = (_STATE, STARTS, TWINS, "rescored", "_review")
# Of a repository in the cache of `huggingface_hub`.
BLOBS, SNAPSHOTS = "blobs", "snapshots"
_MAX_GIVEN = 3
_DATA = EXTENSIONS | {"tar", "parquet"}
# Written next to tars by the engine or by the tools that read them.
_INDEXES = frozenset({"wids.json", "_info.json", SURPLUS})


def open_folder(root: Path, labels: tuple[str, ...], option: str, address: str, split: str = "") -> ImageSource:
    """The images in a folder.

    Tars come before parquet, because a run has both; a folder without either is one of classes. Files of another kind
    are named, and not read.

    Args:
        option, address: where the user gave the folder, for messages.
        split: of tars or parquet files, the split to read; all where empty.

    Raises:
        JobError: it holds several splits, or not the requested one.
        OSError: it cannot be listed.
    """
    return _Folder(root, labels, option, address, split).source()


class _Folder:
    """A folder that is being opened."""

    def __init__(self, root: Path, labels: tuple[str, ...], option: str, address: str, split: str) -> None:
        self._root, self._split = root, split
        names = read_label_map(root, labels, option)
        self._labelling = Labelling(labels, names, root)
        self._option, self._address = option, address.rstrip("/") or address
        entries = list_files(root)
        self._check_cache(entries)
        self._is_own = _is_own(entries)
        self._unread: list[Unusable] = []
        self._entries = [entry for entry in entries if self._is_data(entry)]

    def source(self) -> ImageSource:
        """The source of its images, with what is not read."""
        tars = [entry for entry in self._entries if entry.extension == "tar"]
        if self._is_own and (shards := [entry for entry in tars if entry.parts[:-1] == (SHARDS,)]):
            return self._of_run(shards)
        if tars:
            return self._of_containers(tars, "tars", self._open_tars)
        tables = [entry for entry in self._entries if entry.extension == "parquet" and entry.name not in NAMES]
        with_images = [entry for entry in tables if has_images(self._root / entry.place)]
        is_bare = not any(entry.extension in EXTENSIONS for entry in self._entries)
        if with_images or (tables and is_bare):
            return self._of_containers(with_images or tables, "parquet files", self._open_tables)
        if self._split:
            raise JobError(f"{self._option}: there is no '{self._address}'")
        return self._of_classes()

    def _check_cache(self, entries: Sequence[Entry]) -> None:
        """Refuse a repository in the hub's cache, which has every file twice: by content and by name.

        Raises:
            JobError: it is one.
        """
        paths = [entry.parts for entry in entries]
        snapshots = sorted({parts[1] for parts in paths if parts[0] == SNAPSHOTS and len(parts) > 2})
        if snapshots and any(parts[0] == BLOBS for parts in paths):
            given = " or ".join(f"'{self._address}/{SNAPSHOTS}/{snapshot}'" for snapshot in snapshots[:_MAX_GIVEN])
            raise JobError(f"{self._option}: '{self._address}' is a repository in the hub's cache; give {given}")

    def _is_data(self, entry: Entry) -> bool:
        """Whether a file is to be read; others are recorded as unread, except for the engine's own."""
        is_engines = self._is_own and (
            entry.parts[0] in _INTERNAL
            or (entry.extension not in _DATA and (len(entry.parts) == 1 or entry.parts[0] == SHARDS))
        )
        if entry.place == LABEL_MAP:
            return False
        reason = entry.problem or why_ignored(entry.place)
        if reason and not is_engines:
            self._unread.append(unusable(entry.place, reason))
        return not reason and not is_engines

    def _of_run(self, shards: Sequence[Entry]) -> ImageSource:
        """The shards of a run; other images next to them are reported."""
        known = set(shards)
        others = [entry for entry in self._entries if entry not in known and entry.extension != "parquet"]
        home = self._root / SHARDS
        source = webdataset([self._root / entry.place for entry in shards], self._labelling, home)
        return source.with_unread([*self._unread, *_left_out(others, "the shards of a run")])

    def _of_containers(
        self, files: Sequence[Entry], what: str, read: Callable[[Sequence[Entry]], ImageSource]
    ) -> ImageSource:
        """Tars or parquet files of one split, with all other files reported as unread."""
        chosen = self._of_one_split(files)
        source = read(chosen)
        if self._split:
            return source
        known, stems = set(files), {entry.place.rpartition(".")[0] for entry in files}
        others = [
            entry
            for entry in self._entries
            if entry not in known
            and entry.name not in _INDEXES
            and not (entry.extension == "parquet" and entry.place.rpartition(".")[0] in stems)
        ]
        left_out = sorted(known - set(chosen), key=lambda entry: entry.parts)
        unlisted = [unusable(entry.place, "is in no split that the card (README.md) names") for entry in left_out]
        return source.with_unread([*self._unread, *unlisted, *_left_out(others, what)])

    def _of_one_split(self, files: Sequence[Entry]) -> list[Entry]:
        """The files of the requested split, or of the only one.

        Raises:
            JobError: there are several, or not that one.
        """
        places = [entry.place for entry in files]
        listed = read_splits(self._root, places)
        groups = listed or group_by_split({entry: split_of(entry) for entry in places})
        if self._split:
            chosen = [group for split, group in groups.items() if is_same_split(split, self._split)]
            if not chosen:
                raise JobError(f"{self._option}: there is no '{self._address}'")
            groups = {self._split: chosen[0]}
        if len(groups) > 1:
            self._refuse_splits(sorted(filter(None, groups)), groups.get("", [])[:1])
        split, chosen_places = next(iter(groups.items()))
        if split and not listed and (homes := configurations_of(chosen_places)):
            self._refuse_configurations(homes)
        return [entry for entry in files if entry.place in chosen_places]

    def _refuse_splits(self, splits: Sequence[str], others: Sequence[str] = ()) -> None:
        given = " or ".join(f"'{self._address}/{split}'" for split in [*splits, *others])
        further = f", and files of none, such as '{others[0]}'" if others else ""
        raise JobError(
            f"{self._option}: '{self._address}' holds the split{'s' if len(splits) > 1 else ''}"
            f" {', '.join(splits)}{further}: they are read one at a time; give {given}"
        )

    def _refuse_configurations(self, homes: Sequence[str]) -> None:
        base = self._root.as_posix() if self._split else self._address
        paths = [f"'{base}/{home}'" if home else f"the files of '{base}' itself" for home in homes[:_MAX_GIVEN]]
        given = " or ".join(paths)
        raise JobError(
            f"{self._option}: '{self._address}' has the same files of one split in {len(homes)} folders, as"
            f" configurations of a data set have them: give {given}; or a folder with links to all of them"
        )

    def _open_tars(self, files: Sequence[Entry]) -> ImageSource:
        return webdataset([self._root / entry.place for entry in files], self._labelling, self._root)

    def _open_tables(self, files: Sequence[Entry]) -> ImageSource:
        paths = [self._root / entry.place for entry in files]
        return parquet(paths, self._labelling, card_class_names(self._root), self._root)

    def _of_classes(self) -> ImageSource:
        labelling, listings = self._labelling, self._listings()
        files = [entry for entry in self._entries if entry.name not in NAMES or entry.place in listings.problems]
        home = self._class_home(files, labelling)
        depth = len(home)
        below = [entry.parts[depth:] for entry in files if entry.parts[:depth] == home]
        folders = {parts[0] for parts in below if len(parts) > 1}
        if not listings.listed and (problem := labelling.refuse_unknown(sorted(folders))):
            raise JobError(f"{self._option}: '{self._address}': {problem}")
        labelling.settle(listings.texts() if listings.listed else folders)
        has_contexts = bool(listings.contexts) or (
            not listings.listed and any(context_folder(entry, home) for entry in files)
        )
        reader = ClassReader(self._root, home, labelling, listings, has_contexts)
        items = [partial(reader.read, entry) for entry in files]
        source = ImageSource(KIND, len(items), (partial(iter, items),), labelling=labelling)
        is_own_map = not listings.listed and (self._root / LABEL_MAP).is_file()
        idle = [
            unusable(LABEL_MAP, f"names the label {text!r}, and no folder is called so")
            for text in (labelling.unused(folders) if is_own_map else ())
        ]
        places = {key_of(entry.place) for entry in files}
        missing = [
            unusable(place, f"is listed in {listing}, and is not there")
            for place, (_, listing) in listings.listed.items()
            if place not in places
        ]
        return source.with_unread([*self._unread, *missing, *idle])

    def _listings(self) -> Listings:
        listings = Listings()
        class_names = card_class_names(self._root)
        for entry in self._entries:
            if entry.name in NAMES:
                listings.add(self._root, entry.place, class_names)
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
            below = [parts.parts[len(home) :] for parts in files if parts.parts[: len(home)] == home]
            folders = sorted({parts[0] for parts in below if len(parts) > 1})
            self._check_splits(home, folders, below, labelling)
            inner = {folder for parts in below for folder in parts[1:-1]}
            is_home = len(folders) != 1 or labelling.is_label(folders[0])
            if is_home or not any(labelling.is_label(folder) or keyword_in(folder) for folder in inner):
                return home
            home = (*home, folders[0])

    def _check_splits(
        self, home: tuple[str, ...], folders: Sequence[str], below: Sequence[tuple[str, ...]], labelling: Labelling
    ) -> None:
        """Refuse folders of several splits, above the class folders or in them."""
        splits = [folder for folder in folders if keyword_in(folder) and not labelling.is_class(folder)]
        if is_several(splits):
            self._refuse_splits(["/".join((*home, split)) for split in splits])
        inner = sorted({parts[1] for parts in below if len(parts) > 2 and labelling.is_label(parts[0])})
        within = [folder for folder in inner if keyword_in(folder) and not labelling.is_class(folder)]
        if is_several(within):
            raise JobError(
                f"{self._option}: '{self._address}' holds the splits {', '.join(within)} inside its class folders: they"
                " are read one at a time; give a folder with the classes of one split, which may be links"
            )


def _is_own(entries: Sequence[Entry]) -> bool:
    """Whether the engine wrote a folder: a run, finished or not, or an export."""
    has_shards = any(entry.parts[0] == SHARDS and entry.extension == "tar" for entry in entries)
    names = {entry.parts[0] for entry in entries}
    return _STATE in names or names.issuperset(_MARKS) or (ROWS in names and has_shards)


def _left_out(entries: Iterable[Entry], what: str) -> list[Unusable]:
    """Files of another kind next to those that are read."""
    remedy = "; give its folder by itself"
    return [
        unusable(entry.place, f"is next to {what}, which are read{remedy if entry.extension in _DATA else ''}")
        for entry in entries
    ]
