"""LoRA weights and textual inversions of a job, found and checked by the headers of their files. Imports no torch.

A LoRA adds `weight * alpha / r * B A` to a matrix [out, in] of a part, with A [r, in] and B [out, r] (Hu et al. 2022).
A textual inversion adds words to a tokenizer, and their embeddings [vectors, d] to its text encoder (Gal et al. 2022).
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.job.spec import AdapterSpec
from engine.models.configurations import read_config, reading_configuration
from engine.models.pipelines.base import Pipeline
from engine.models.pipelines.lookup import family_of
from engine.models.pipelines.parts import text_config
from engine.models.stored_tensors import StoredTensor, stored_tensors, tensors_in
from engine.models.weight_files import has_weights

# Names of files in the folder of an adapter, as diffusers and peft save them.
_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "learned_embeds.safetensors")
# The ends of a pair's names: of A, of B, and the scale of both.
_A = re.compile(r"(.+?)[._](?:lora_A(?:\.\w+)?|lora\.down|lora_down|lora_linear_layer\.down)\.weight")
_B = re.compile(r"(.+?)[._](?:lora_B(?:\.\w+)?|lora\.up|lora_up|lora_linear_layer\.up)\.weight")
_FLOATS = ("F64", "F32", "F16", "BF16")
_ALPHA = re.compile(r"(.+?)\.alpha")
# LoRA weights of diffusers before 0.17: `attn1.processor.to_q_lora.down.weight`.
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
# Adapters of other kinds, whose weights diffusers leaves out or cannot read.
_OTHERS = (("dora_scale", "DoRA"), ("hada_", "LoHa"), ("lokr_", "LoKr"), ("lora_mid", "LoCon with CP decomposition"))
# Kohya's names of Stability's own layers, which diffusers maps to its own as it loads them.
_STABILITY = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks)_")
LORA_PACKAGE = "peft"

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Embedding:
    """A textual inversion.

    Attributes:
        name: of its tensor.
        token: its word in prompts; of several vectors that of the first, the others are `token_1`, ...
    """

    name: str
    token: str
    shape: Shape

    @property
    def num_vectors(self) -> int:
        """Words that it adds to the tokenizer."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def tokens(self) -> list[str]:
        """The words of all vectors."""
        return [self.token, *(f"{self.token}_{place}" for place in range(1, self.num_vectors))]


def adapter_file(address: str) -> Path:
    """The file of an adapter.

    Raises:
        JobError: there is none, or it is not of safetensors by its name.
    """
    path = Path(address).expanduser()
    if path.is_dir():
        candidates = [path / name for name in _FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
        if len(candidates) != 1:
            count = "no" if not candidates else "several"
            raise JobError(f"'{address}' has {count} files of safetensors; give the adapter's file")
        path = candidates[0]
    if not path.is_file():
        raise JobError(f"'{address}' is neither a file nor a folder here; download the adapter, and give its file")
    if path.suffix != ".safetensors":
        raise JobError(
            f"'{address}' is not a .safetensors file, the only format that is loaded: others may run any code; convert"
            ' it once, if you trust it: python -c "import torch, safetensors.torch as s;'
            f" s.save_file(torch.load('{path}', weights_only=True), '{path.stem}.safetensors')\""
        )
    return path


def adapter_digest(address: str) -> str:
    """Digest of the content of an adapter's file, wherever it is.

    Raises:
        JobError: it cannot be found.
    """
    with adapter_file(address).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def adapter_identity(adapter: AdapterSpec) -> dict[str, Any]:
    """What an adapter is in a plan: its content, its weight, and its word where the job gives one."""
    token = {"token": adapter.token} if adapter.token else {}
    return {"digest": adapter_digest(adapter.address), "weight": adapter.weight} | token


def embedding_of(tensors: dict[str, StoredTensor], token: str | None) -> Embedding | None:
    """The textual inversion that a file holds; None where it holds something else.

    Args:
        token: of the job, in place of the name of the file's tensor.
    """
    if len(tensors) != 1:
        return None
    [(name, tensor)] = tensors.items()
    if not 1 <= len(tensor.shape) <= 2 or "lora" in name:
        return None
    return Embedding(name, token or name, tensor.shape)


def adapter_problems(adapters: Sequence[AdapterSpec], folder: Path, address: str) -> list[str]:
    """What does not go with a pipeline; lines that begin with `adapters.NUMBER`.

    Args:
        folder: of a pipeline that `check_pipeline` lets through.
        address: of the pipeline.
    """
    if not adapters:
        return []
    try:
        family, problems, words = family_of(folder, address), list[str](), dict[str, int]()
    except JobError:
        # It is refused by itself.
        return []
    for number, adapter in enumerate(adapters):
        try:
            with reading_configuration(address):
                lines = list(_problems(adapter, family, folder, address, words, number))
        except JobError as error:
            lines = [f": {problem}" for problem in error.problems]
        problems += [f"adapters.{number}{line}" for line in lines]
    return problems


def _problems(
    adapter: AdapterSpec, family: type[Pipeline], folder: Path, address: str, words: dict[str, int], number: int
) -> Iterator[str]:
    """Lines that go on after `adapters.NUMBER`; `words` are those of the embeddings before, with their numbers."""
    tensors = tensors_in(adapter_file(adapter.address))
    if problem := _values_problem(tensors):
        yield f": '{adapter.address}' {problem}"
        return
    if embedding := embedding_of(tensors, adapter.token):
        yield from _embedding_problems(adapter, embedding, family, folder, address)
        for word in embedding.tokens:
            if word in words:
                yield f".token: the word '{word}' is that of adapters.{words[word]} too; give one of them another token"
            words.setdefault(word, number)
        return
    if adapter.token is not None:
        yield f".token: '{adapter.address}' is not an embedding of a word; leave token out"
    if not any("lora" in name for name in tensors):
        found = ", ".join(sorted(tensors)[:3]) or "nothing"
        pair = {"clip_l", "clip_g"} <= set(tensors)
        what = (
            "an embedding of two text encoders, which is not taken here" if pair else "neither a LoRA nor an embedding"
        )
        yield f": '{adapter.address}' is {what}; it holds {found}: give a LoRA, or the embedding of a word"
        return
    if not family.lora_prefixes:
        yield f": '{address}' is a {family.class_name}, which takes no LoRA here; leave it out"
        return
    if importlib.util.find_spec(LORA_PACKAGE) is None:
        yield f": LoRA weights need {LORA_PACKAGE}; install riskforge[lora]"
        return
    yield from _lora_problems(adapter.address, tensors, family, folder, address)


def _values_problem(tensors: Mapping[str, StoredTensor]) -> str:
    """Why values are no weights, as a predicate with the remedy; empty if they are."""
    for name, tensor in tensors.items():
        if 0 in tensor.shape:
            return f"has {name} without entries; get the file again"
        if tensor.dtype not in _FLOATS and not _ALPHA.fullmatch(name):
            return f"has {name} of type {tensor.dtype}; quantised weights are not applied: save them in float16"
    return ""


def _embedding_problems(
    adapter: AdapterSpec, embedding: Embedding, family: type[Pipeline], folder: Path, address: str
) -> Iterator[str]:
    if not family.embedding_encoder:
        yield f": '{address}' is a {family.class_name}, which takes no textual inversion here; leave it out"
        return
    if adapter.weight != 1:
        yield f".weight: {adapter.weight:g}; '{adapter.address}' is an embedding, which is taken as it is: use 1"
    if embedding.token == "emb_params" or re.search(r"\s", embedding.token):
        yield ".token: the file names no word for prompts; give one, such as <thing>"
    width = text_config(folder / family.embedding_encoder).get("hidden_size", 512)
    if embedding.shape[-1] != width:
        yield (
            f": the embeddings of '{adapter.address}' have {embedding.shape[-1]} entries, those of the text encoder of"
            f" '{address}' {width}; it was made for another model"
        )
    # CLIP's tokenizers mark the ends of words.
    vocabulary = _vocabulary(folder / "tokenizer")
    if known := [word for word in embedding.tokens if vocabulary & {word, f"{word}</w>", f"{word.lower()}</w>"}]:
        yield f".token: '{known[0]}' is a word of the tokenizer of '{address}' already; give another token"


def _vocabulary(tokenizer: Path) -> set[str]:
    """The tokens of a tokenizer, those that were added too."""
    if (tokenizer / "tokenizer.json").is_file():
        content = read_config(tokenizer / "tokenizer.json")
        return {*content["model"]["vocab"], *(token["content"] for token in content.get("added_tokens") or [])}
    added = tokenizer / "added_tokens.json"
    return {*read_config(tokenizer / "vocab.json"), *(read_config(added) if added.is_file() else ())}


def _lora_problems(
    of: str, tensors: dict[str, StoredTensor], family: type[Pipeline], folder: Path, address: str
) -> Iterator[str]:
    """Names that fit no part, pairs that are not whole, and shapes that are not those of the weights they change."""
    for mark, kind in _OTHERS:
        if name := next((name for name in tensors if mark in name), None):
            yield f": '{of}' holds {name}, of {kind}; only LoRA weights are applied: fuse it with what it was made with"
            return
    pairs, unknown = lora_pairs(tensors)
    if unknown:
        yield f": '{of}' holds {unknown[0]}, which is no weight of a LoRA ({len(unknown)} such names)"
        return
    known = {part: _matrices(folder / part) for part in family.lora_prefixes if has_weights(folder / part)}
    problems = [problem for name, pair in pairs.items() if (problem := _pair_problem(name, *pair, family, known))]
    if problems:
        more = f" ({len(problems)} of its {len(pairs)} layers do not fit)" if len(problems) > 1 else ""
        yield f": '{of}' does not fit '{address}': {problems[0]}{more}; it was made for another model, or is damaged"


def lora_pairs(tensors: dict[str, StoredTensor]) -> tuple[dict[str, tuple[Shape, Shape]], list[str]]:
    """The shapes of A and B by the name of what they change, empty where one is missing, and names of anything else."""
    downs, ups, unknown = dict[str, Shape](), dict[str, Shape](), list[str]()
    for name, tensor in tensors.items():
        if m := _PROCESSOR.fullmatch(name):
            place = f"{m[1]}.{m[2]}" + (".0" if m[2] == "to_out" else "")
            (downs if m[3] == "down" else ups)[place] = tensor.shape
        elif m := _A.fullmatch(name):
            downs[m[1]] = tensor.shape
        elif m := _B.fullmatch(name):
            ups[m[1]] = tensor.shape
        elif not _ALPHA.fullmatch(name):
            unknown.append(name)
    return {name: (downs.get(name, ()), ups.get(name, ())) for name in sorted({*downs, *ups})}, unknown


def _pair_problem(
    name: str, down: Shape, up: Shape, family: type[Pipeline], known: dict[str, dict[str, Shape]]
) -> str | None:
    if len(down) < 2 or len(up) < 2:
        return f"{name} has only one of its two matrices"
    if down[0] != up[1] or down[0] == 0:
        return f"{name} has matrices of rank {down[0]} and {up[1]}"
    if _STABILITY.match(name):
        return None
    for part, prefixes in family.lora_prefixes.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                return _shape_problem(name, down, up, known.get(part, {}).get(_flat(name.removeprefix(prefix))), part)
    return f"{name} is of no part of a {family.class_name} ({', '.join(family.lora_prefixes)})"


def _shape_problem(name: str, down: Shape, up: Shape, matrix: Shape | None, part: str) -> str | None:
    if matrix is None:
        return f"{part} has no layer {name}"
    is_same_kernel = len(down) == 2 or set(matrix[2:]) <= {1} or down[2:] == matrix[2:]
    if (up[0], down[1]) != matrix[:2] or not is_same_kernel:
        return f"{name} changes a matrix of {up[0]} x {down[1]}, that of {part} is {' x '.join(map(str, matrix))}"
    return None


def _matrices(part: Path) -> dict[str, Shape]:
    """Shapes of the weights of a part by the names of their layers, without dots."""
    shapes = {}
    for name, tensor in stored_tensors(part).items():
        if name.endswith(".weight") and len(tensor.shape) > 1:
            layer = name.removesuffix(".weight")
            shapes[_flat(layer)] = shapes[_flat(layer.removeprefix("text_model."))] = tensor.shape
            shapes[_flat(f"text_model.{layer}")] = tensor.shape
    return shapes


def _flat(name: str) -> str:
    """Kohya's name of a layer, which has no dots."""
    return name.replace(".", "_")
