"""Log output and progress bars of diffusers and transformers."""

from __future__ import annotations

import os


def quiet_libraries() -> None:
    """Keep progress bars, advice and warnings of diffusers and transformers out of the terminal; errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.set_verbosity_error()
        library.disable_progress_bar()
