"""What an export says before it begins: which keys change, and which samples are taken once."""

from __future__ import annotations

from collections.abc import Iterator

from engine.data.reading.corpus import Corpus
from engine.data.reading.selection import Selection


def selection_notices(corpus: Corpus, selection: Selection) -> tuple[str, ...]:
    """What becomes of keys and samples that several runs have, in words."""
    return (*_key_notices(corpus, selection), *_identical_notices(corpus, selection))


def _key_notices(corpus: Corpus, selection: Selection) -> Iterator[str]:
    for number, prefix in sorted(selection.prefixes.items()):
        source, (count, key) = corpus.runs[number], selection.clashes[number]
        named = next((other for other in corpus.runs[:number] if other.name == source.name), None)
        why = f"is named '{source.name}' like {named.uri}" if named else "has keys of an earlier run"
        yield (
            f"{source.uri}: {why}, and has other images under {count} of its keys: in the new data set all its keys"
            f" begin with {prefix}, such as {prefix}{key}"
        )


def _identical_notices(corpus: Corpus, selection: Selection) -> Iterator[str]:
    for number, count in sorted(selection.identical.items()):
        source = corpus.runs[number]
        if not count:
            continue
        same = next((other for other in corpus.runs[:number] if source.digest and other.digest == source.digest), None)
        why = f"has the plan of {same.uri}; " if same else ""
        left = sum(sample.run == number for sample in selection.samples)
        rest = "" if left else ", and nothing else is in it"
        yield f"{source.uri}: {why}{count} samples are in an earlier run too, and are taken once{rest}"
