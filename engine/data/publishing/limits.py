"""What the Hub recommends of sizes and counts (huggingface.co/docs/hub/storage-limits), checked before a push."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from engine.data.publishing.contents import Contents

MAX_FILES = 100_000
MAX_IN_FOLDER = 10_000
MAX_FILE_BYTES = 50 * 10**9
# In a commit: 50 to 100 files are recommended, some hundred commits an hour are allowed.
FILES_IN_COMMIT = 50
MAX_FILES_IN_COMMIT = 1000
MAX_COMMIT_BYTES = 50 * 10**9
NUM_COMMITS = 100


def limit_warnings(contents: Contents) -> Iterator[str]:
    """What of a data set is beyond what the Hub recommends, a line each."""
    folders, num_files = Counter[str](), 0
    for file in contents.files:
        folder = file.name.rpartition("/")[0]
        folders[folder] += 1
        num_files += 1
        if file.num_bytes > MAX_FILE_BYTES:
            size = f"{file.num_bytes / 1e9:.0f} GB"
            yield f"{file.name} has {size}, and the Hub takes files of {MAX_FILE_BYTES // 10**9} GB at most"
    fewer = "`riskforge merge --samples-per-shard N` makes fewer and larger ones"
    for folder, count in sorted(folders.items()):
        if count > MAX_IN_FOLDER:
            where = f"{folder}/" if folder else "the top folder"
            yield f"{where} would hold {count:,} files, and the Hub recommends at most {MAX_IN_FOLDER:,}; {fewer}"
    if num_files > MAX_FILES:
        yield f"the repository would hold {num_files:,} files, and the Hub recommends at most {MAX_FILES:,}; {fewer}"


def files_in_commit(num_files: int) -> int:
    """How many files a commit has: more where there would be too many commits."""
    return min(MAX_FILES_IN_COMMIT, max(FILES_IN_COMMIT, -(-num_files // NUM_COMMITS)))
