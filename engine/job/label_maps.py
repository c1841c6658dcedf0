"""Label maps: which classes of one list of names are which of another, where names or their order differ."""

from __future__ import annotations

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import JobError
from engine.job.class_lookup import find_class, folded, has_numeric_names, is_index
from engine.job.spec_messages import Location, Problem, nearest, shown

# In a label map, of a class that is none of the target's.
NO_COUNTERPART = -1
# Of a message: names of a list, entries of a map, characters of a name.
_MAX_NAMES, _MAX_ENTRIES, _MAX_CHARS = 10, 20, 60
# Names so similar are offered as one, where nothing else fits either.
_SIMILARITY, _MIN_SIMILAR_CHARS, _MAX_COMPARED = 0.8, 5, 50
_MAX_NAME_CHARS = 1000
# Endings of plurals, and what stands for them in the singular.
_PLURALS = (("s", ""), ("es", ""), ("ies", "y"))


@dataclass(frozen=True, slots=True)
class LabelMap:
    """The classes of a model as those of the target.

    Attributes:
        places: of each of the model's m classes the target's class that it means, or `NO_COUNTERPART`.
        num_classes: n, of the target.
    """

    places: tuple[int, ...]
    num_classes: int

    @property
    def sources(self) -> list[list[int]]:
        """Of each of the target's n classes the model's classes that mean it."""
        found: list[list[int]] = [[] for _ in range(self.num_classes)]
        for source, place in enumerate(self.places):
            if place != NO_COUNTERPART:
                found[place].append(source)
        return found

    @property
    def others(self) -> list[int]:
        """The model's classes that are none of the target's."""
        return [source for source, place in enumerate(self.places) if place == NO_COUNTERPART]

    @property
    def is_reordering(self) -> bool:
        """Whether each class of one is exactly one of the other."""
        return sorted(self.places) == list(range(self.num_classes))


def checked_entries(value: Any) -> dict[str, str | None]:
    """A label map as written, with indices as texts.

    Args:
        value: class names or indices of one list to those of another; to nothing for a class that is none of them.

    Raises:
        ValueError: it is no mapping of such, in words that follow the name of the field.
    """
    if not isinstance(value, Mapping):
        raise ValueError("is not a mapping of class names to class names, such as {cats: cat}")
    entries: dict[str, str | None] = {}
    for key, named in value.items():
        text = _name(key)
        if text in entries:
            raise ValueError(f"has {text!r} twice, as a name and as an index")
        entries[text] = None if named is None else _name(named)
    return entries


def checked_maps(value: Any) -> dict[str, dict[str, str | None]]:
    """Label maps by the address of a model, as written; indices become texts, as JSON has no other keys.

    Raises:
        ValueError: as `checked_entries`, or the whole is no mapping.
    """
    if not isinstance(value, dict):
        raise ValueError("is not a mapping of addresses to label maps, such as {models/net: {cats: cat}}")
    maps = {}
    for address, entries in value.items():
        if not isinstance(address, str):
            raise ValueError(f"has the key {shown(address)}, where the address of a model is expected")
        try:
            maps[address] = checked_entries(entries)
        except ValueError as error:
            raise ValueError(f"of {shown(address)}: {error}") from None
    return maps


def _name(value: Any) -> str:
    """A class as a text.

    Raises:
        ValueError: the value is neither a name nor an index.
    """
    if isinstance(value, bool):
        raise ValueError(f"has {value}, as YAML reads yes, no, on and off; put such a class name in quotes")
    if isinstance(value, int) and 0 <= value < 10**9:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"has {shown(value)}, which is neither a class name nor an index; put a name in quotes")
    if len(value) > _MAX_NAME_CHARS:
        raise ValueError(f"has a name of {len(value)} characters; give {_MAX_NAME_CHARS} or fewer")
    return value


def match_labels(
    theirs: Sequence[str],
    ours: Sequence[str],
    entries: Mapping[str, str | None] | None,
    name: str,
    whose: str,
    place: str = "",
) -> LabelMap | None:
    """How a model's classes are read as the target's; None where they are the same in the same order.

    Without entries, equal names in another order are matched by name. With entries, so are the names that these leave
    out. What has no counterpart is a class that is none of the target's.

    Args:
        theirs, ours: names of the model's and of the target's classes, in index order.
        entries: from `checked_entries`; None where the job has none.
        name: address of the model, for messages.
        whose: the field of its entries, for messages.
        place: where to write entries, for messages; the field of a job file where empty.

    Raises:
        JobError: names differ and there are no entries (without a field); or entries name unknown classes, or leave one
            of the target's without a counterpart (with `whose`); all problems, a line each.
    """
    if entries is None:
        if list(theirs) == list(ours):
            return None
        if len(set(theirs)) == len(theirs) and sorted(theirs) == sorted(ours):
            by_label = {label: index for index, label in enumerate(ours)}
            return LabelMap(tuple(by_label[label] for label in theirs), len(ours))
        raise JobError(_difference(theirs, ours, name, place))
    given, problems = _resolved(entries, theirs, ours, whose)
    if problems:
        raise JobError(problems)
    # Names that several classes share say nothing of which is which.
    counts, by_name = Counter([*set(ours), *theirs]), {label: index for index, label in enumerate(ours)}
    for label, count in Counter(ours).items():
        if count > 1:
            del by_name[label]
    places = tuple(
        given.get(source, by_name.get(label, NO_COUNTERPART) if counts[label] <= 2 else NO_COUNTERPART)
        for source, label in enumerate(theirs)
    )
    found = set(places)
    if lacking := [label for index, label in enumerate(ours) if index not in found]:
        raise JobError(
            f"{whose}: no class of '{name}' is mapped to {listed(lacking)}, which it could never predict; it has"
            f" {listed(theirs)}"
        )
    return LabelMap(places, len(ours))


def _resolved(
    entries: Mapping[str, str | None], theirs: Sequence[str], ours: Sequence[str], whose: str
) -> tuple[dict[int, int], list[str]]:
    """Indices by index, and what is wrong with entries."""
    given: dict[int, int] = {}
    problems: list[str] = []
    lookups = (_Lookup(theirs, "the model"), _Lookup(ours, "the target"))
    for key, named in entries.items():
        try:
            with_hint = len(problems) < _MAX_NAMES
            source = lookups[0].index(key, with_hint=with_hint)
            place = NO_COUNTERPART if named is None else lookups[1].index(named, with_hint=with_hint)
        except ValueError as error:
            problems.append(f"{whose}: {error}")
            continue
        if source in given:
            problems.append(f"{whose}: {key!r} is class {source}, {theirs[source]!r}, named before; name each once")
        given[source] = place
    if (more := len(problems) - _MAX_ENTRIES) > 0:
        problems[_MAX_ENTRIES:] = [f"{whose}: has {more} more problems like these"]
    return given, problems


def find_label(labels: Sequence[str], owner: str) -> Callable[[str], int]:
    """What gives the index of the class of a name or index; it raises a `ValueError` in words where there is none.

    Args:
        owner: of the classes, for messages.
    """
    return _Lookup(labels, owner).index


class _Lookup:
    """Finds the classes that entries name: as `find_class`, in lists of any length."""

    def __init__(self, labels: Sequence[str], owner: str) -> None:
        self._labels, self._owner = labels, owner
        self._is_numeric = has_numeric_names(labels)
        self._by_form: dict[str, set[int]] = defaultdict(set)
        for index, label in enumerate(labels):
            for part in (label, *label.split(",")):
                self._by_form[folded(part)].add(index)

    def index(self, word: str, *, with_hint: bool = True) -> int:
        """Index of the class of a name or index.

        Raises:
            ValueError: there is none, or several.
        """
        found = candidates = sorted(self._by_form.get(folded(word), ()))
        if len(candidates) > 1:
            found = [candidates[place] for place in find_class(word, [self._labels[index] for index in candidates])]
        if not found and is_index(word) and not self._is_numeric and int(word) < len(self._labels):
            return int(word)
        if len(found) > 1:
            numbers = ", ".join(map(str, found[:_MAX_NAMES]))
            raise ValueError(f"{shown(word)} is the name of classes {numbers} of {self._owner}; give the index")
        if not found:
            hint = nearest(word[:_MAX_CHARS], list(self._labels)) if with_hint else ""
            raise ValueError(
                f"{shown(word)} is not a class of {self._owner}{hint or f', which has {listed(self._labels)}'}"
            )
        return found[0]


def _difference(theirs: Sequence[str], ours: Sequence[str], name: str, place: str) -> str:
    """That names differ, with both lists and the map that would say which are which."""

    def written(pairs: Any) -> str:
        return _yaml({name: pairs} if place else {"models": {"label_map": {name: pairs}}})

    shared = [label for label, count in Counter(ours).items() if count > 1]
    if shared and sorted(theirs) == sorted(ours):
        example = written({0: 1, 1: 0})
        return (
            f"'{name}' has the target's classes in another order, and several are called {listed(shared)}: map the"
            f" classes by their indices{place}, as in {example}"
        )
    only_theirs, only_ours = without(theirs, ours), without(ours, theirs)
    owner = "the run" if place else "the target"
    lists = both_lists(only_theirs, theirs, only_ours, owner)
    offered = offered_map(only_theirs, only_ours, written)
    return f"'{name}' has other classes than {owner}: {lists}; say which are which{place}: {offered}"


def both_lists(only_theirs: Sequence[str], theirs: Sequence[str], only_ours: Sequence[str], owner: str) -> str:
    """What each of two lists of names has that the other has not.

    Args:
        owner: of the other list.
    """
    both = len(theirs) - len(only_theirs)
    shared = f" ({both} {'is' if both == 1 else 'are'} in both)" if both else ""
    return f"it has {_side(only_theirs)}, {owner} has {_side(only_ours)}{shared}"


def _side(own: Sequence[str]) -> str:
    return listed(own) if own else "nothing else"


def without(labels: Sequence[str], others: Sequence[str]) -> list[str]:
    """The labels that are not among others, each once, in their order."""
    known = set(others)
    return [label for label in dict.fromkeys(labels) if label not in known]


def listed(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    texts = [repr(name if len(name) <= _MAX_CHARS else f"{name[: _MAX_CHARS - 3]}...") for name in names[:_MAX_NAMES]]
    more = len(names) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more > 0 else "")


def offered_map(theirs: Sequence[str], ours: Sequence[str], written: Callable[[dict[str, str]], str]) -> str:
    """A map that is filled in where names are nearly equal, and what is left to fill in.

    Args:
        theirs, ours: names that only one of two lists has.
        written: a map as a file has it.
    """
    pairs = nearly_equal(theirs, ours)
    some = dict(list(pairs.items())[:_MAX_ENTRIES])
    if not some and theirs and ours:
        some = {theirs[0]: ours[0]}
        return f"{written(some)}, if {theirs[0]!r} means {ours[0]!r}, and so on"
    text = written(some)
    if len(pairs) > len(some):
        text += f" and {len(pairs) - len(some)} more"
    known = set(pairs.values())
    missing = [label for label in ours if label not in known]
    return f"{text}, and in it what means {listed(missing)}" if missing else text


def _yaml(value: Any) -> str:
    """A mapping in one line, as a job file has it."""
    import yaml

    return str(yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)).strip()


def nearly_equal(theirs: Sequence[str], ours: Sequence[str]) -> dict[str, str]:
    """Names that differ in case, separators, number or synonyms alone, or in a few letters where nothing else fits."""
    keys: tuple[Callable[[str], set[str]], ...] = (_forms, _singular_forms)
    pairs: dict[str, str] = {}
    for key in keys:
        places: dict[str, set[str]] = defaultdict(set)
        for label in ours:
            for form in key(label):
                places[form].add(label)
        for label in theirs:
            found = set[str]().union(*(places[form] for form in key(label) if form in places))
            if label not in pairs and len(found) == 1:
                pairs[label] = found.pop()
    known = set(pairs.values())
    rest = {folded(label): label for label in ours if label not in known and len(label) >= _MIN_SIMILAR_CHARS}
    for label in [label for label in theirs if label not in pairs][:_MAX_COMPARED]:
        some = list(rest)[: 10 * _MAX_COMPARED]
        if match := difflib.get_close_matches(folded(label), some, n=1, cutoff=_SIMILARITY):
            pairs[label] = rest.pop(match[0])
    return {label: pairs[label] for label in theirs if label in pairs}


def _forms(label: str) -> set[str]:
    """A name and its synonyms without differences of case and separators."""
    return {form for part in (label, *label.split(",")) if (form := re.sub(r"[\W_]+", "", folded(part)))}


def _singular_forms(label: str) -> set[str]:
    """The forms of a name, and what is left of each without the ending of a plural."""
    forms = _forms(label)
    cut = {form[: -len(ending)] + letter for form in forms for ending, letter in _PLURALS if form.endswith(ending)}
    return forms | {form for form in cut if len(form) > 1}


def label_map_problems(raw: Mapping[str, Any], addresses: Iterable[str]) -> list[Problem]:
    """Label maps of no model of a job.

    Args:
        raw: the job.
        addresses: of the models that may have one.
    """
    models = raw.get("models")
    given = models.get("label_map") if isinstance(models, Mapping) else None
    if not isinstance(given, Mapping):
        return []
    known = list(addresses)
    where: Location = ("models", "label_map")
    return [((*where, address), _unknown_model(address, known)) for address in given if address not in known]


def _unknown_model(address: Any, known: Sequence[str]) -> str:
    if not known:
        return "there is no oracle, transfer model or further target whose classes it could map; leave it out"
    hint = nearest(address, list(known)) if isinstance(address, str) else ""
    return f"no oracle, transfer model or further target has this address{hint or f': {listed(known)}'}"
