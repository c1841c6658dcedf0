"""A persistent (immutable) map whose copies share structure: the scheduler keeps thousands of workers in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

NUM_BUCKETS = 128

Value = TypeVar("Value")


class PersistentMap(Mapping[int, Value], Generic[Value]):
    """An immutable map from numbers. A changed copy shares all buckets but one, so it costs little."""

    __slots__ = ("_buckets", "_num")

    def __init__(self) -> None:
        self._buckets: dict[int, dict[int, Value]] = {}
        self._num = 0

    def __getitem__(self, key: int) -> Value:
        return self._buckets[key % NUM_BUCKETS][key]

    def __iter__(self) -> Iterator[int]:
        return (key for bucket in self._buckets.values() for key in bucket)

    def __len__(self) -> int:
        return self._num

    def put(self, key: int, value: Value) -> PersistentMap[Value]:
        """A copy in which `key` has this value."""
        bucket = self._buckets.get(key % NUM_BUCKETS, {})
        return self._changed(key, {**bucket, key: value}, self._num + (key not in bucket))

    def drop(self, key: int) -> PersistentMap[Value]:
        """A copy without `key`; the same map where it is absent."""
        bucket = self._buckets.get(key % NUM_BUCKETS, {})
        if key not in bucket:
            return self
        return self._changed(key, {other: value for other, value in bucket.items() if other != key}, self._num - 1)

    def _changed(self, key: int, bucket: dict[int, Value], num: int) -> PersistentMap[Value]:
        copy: PersistentMap[Value] = PersistentMap()
        copy._buckets = {**self._buckets, key % NUM_BUCKETS: bucket}
        copy._num = num
        return copy
