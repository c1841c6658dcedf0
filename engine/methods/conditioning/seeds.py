"""Seeds of further random streams, derived from the seed of a sample or of a job."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, purpose: str) -> int:
    """A seed below 2^32 of another stream for a purpose: equal in every process, different for every purpose.

    Args:
        seed: of the sample or job.
        purpose: what the stream is for.
    """
    # Four bytes: numpy takes no more, and torch's CPU generator ignores what is above them.
    digest = hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=4).digest()
    return int.from_bytes(digest)
