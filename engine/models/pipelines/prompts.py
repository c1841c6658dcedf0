"""Text embeddings of prompts, each computed once and independently of its batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.errors import JobError
from engine.methods.sampling.denoiser import Condition

# Prompts whose embeddings are kept on the device: 120 kB each for Stable Diffusion 1.x in half precision.
MAX_EMBEDDINGS = 1024

# Token ids [1, tokens] and attention mask, or None, to the network's inputs of a prompt by name, [1, ...] each.
Embed = Callable[[Tensor, Tensor | None], Mapping[str, Tensor]]


class PromptEncoder:
    """A tokenizer and a text encoder, with a cache of the last prompts.

    Args:
        tokenizer: of transformers.
        embed: runs the text encoder.
        device: of the text encoder.
        uses_mask: whether padding is masked.
        num_tokens: to which prompts are padded, and that they may have; those of the tokenizer if None.
        cuts: read the first tokens of longer prompts, for an encoder beside another one that reads them whole.
        max_embeddings: prompts whose embeddings are kept.
    """

    def __init__(
        self,
        tokenizer: Any,
        embed: Embed,
        *,
        device: str,
        uses_mask: bool = False,
        num_tokens: int | None = None,
        cuts: bool = False,
        max_embeddings: int = MAX_EMBEDDINGS,
    ) -> None:
        self._tokenizer = tokenizer
        self._most_tokens = num_tokens
        self._cuts = cuts
        self._max_embeddings = max_embeddings
        self._embed = embed
        self._device = device
        self._uses_mask = uses_mask
        self._embeddings: dict[str, Mapping[str, Tensor]] = {}

    @property
    def _num_tokens(self) -> int:
        limit: int = self._most_tokens or self._tokenizer.model_max_length
        return limit

    def check(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that the text encoder would cut off without notice.

        Raises:
            JobError: naming the first prompt that is too long.
        """
        for prompt in () if self._cuts else prompts:
            if (length := len(self._tokenizer(self.expanded(prompt)).input_ids)) > (limit := self._num_tokens):
                raise JobError(
                    f"prompt '{prompt[:80]}' has {length} tokens, the text encoder reads {limit}; shorten it"
                )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Text embeddings [B, ...] of B prompts by name.

        Raises:
            JobError: a prompt is too long.
        """
        for prompt in prompts:
            # One by one: a prompt's embedding must not depend on the prompts of other samples.
            if prompt not in self._embeddings:
                self.check([prompt])
                self._embeddings[prompt] = self._encode(prompt)
        rows = [self._embeddings[prompt] for prompt in prompts]
        condition = Condition({name: torch.cat([row[name] for row in rows]) for name in rows[0]})
        while len(self._embeddings) > self._max_embeddings:
            del self._embeddings[next(iter(self._embeddings))]
        return condition

    def _encode(self, prompt: str) -> Mapping[str, Tensor]:
        tokens = self._tokenizer(
            [self.expanded(prompt)],
            padding="max_length",
            truncation=True,
            max_length=self._num_tokens,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(self._device) if self._uses_mask else None
        return self._embed(tokens.input_ids.to(self._device), mask)

    def expanded(self, prompt: str) -> str:
        """A prompt with every vector of its textual inversions, as diffusers' `maybe_convert_prompt` has it.

        A token `<cat>` with further vectors `<cat>_1`, `<cat>_2` stands for all of them.
        """
        known = self._tokenizer.added_tokens_encoder
        for token in dict.fromkeys(self._tokenizer.tokenize(prompt)):
            if token in known:
                more = itertools.takewhile(known.__contains__, (f"{token}_{place}" for place in itertools.count(1)))
                prompt = prompt.replace(token, " ".join([token, *more]))
        return prompt
