"""The T5 text encoder of a pipeline: its checks by configurations, without torch, and its loading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.methods.config_values import shown
from engine.models.configurations import read_config
from engine.models.pipelines.checks import vocabulary_problems
from engine.models.pipelines.parts import load_part
from engine.models.pipelines.registry import what_runs

T5_ENCODERS, T5_TOKENIZERS = ("T5EncoderModel",), ("T5TokenizerFast", "T5Tokenizer")
# Prompts whose embeddings by T5 are kept on the device: 2 MB each in half precision.
T5_EMBEDDINGS = 128


def tokenizer_file_problem(folder: Path, tokenizer: str) -> str:
    """A tokenizer that would have to be converted; as a predicate of the pipeline, empty if there is none."""
    if (folder / tokenizer / "tokenizer.json").is_file():
        return ""
    return f"has no {tokenizer}/tokenizer.json; load it with transformers' T5TokenizerFast, and save it there"


def t5_problems(folder: Path, encoder: str, tokenizer: str, option: str, asked: Any) -> Iterator[str]:
    """A T5 that does not fit its tokenizer, or the transformer that reads its embeddings.

    Args:
        encoder, tokenizer: names of the parts.
        option: of the transformer.
        asked: its value, the entries of an embedding.
    """
    config = read_config(folder / encoder / "config.json")
    if (kind := config.get("model_type", "t5")) != "t5":
        yield f"{encoder}/config.json is of type {shown(kind)}, not of T5; {what_runs()}"
    elif (width := config.get("d_model", 512)) != asked:
        yield (
            f"transformer/config.json has {option}: {shown(asked)}, the embeddings of T5 have {shown(width)} entries;"
            " its parts are not of one model"
        )
    yield from vocabulary_problems(folder / tokenizer, config.get("vocab_size", 32128))


def load_t5(folder: Path, encoder: str, tokenizer: str, dtype: Any) -> tuple[Any, Any]:
    """Text encoder and tokenizer of a pipeline's folder.

    Raises:
        ValueError: as `engine.models.loading.whole`.
    """
    from transformers.models.t5.modeling_t5 import T5EncoderModel
    from transformers.models.t5.tokenization_t5 import T5Tokenizer

    model = load_part(T5EncoderModel, folder / encoder, dtype=dtype)
    return model, T5Tokenizer.from_pretrained(folder / tokenizer, local_files_only=True)
