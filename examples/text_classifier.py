"""A text classifier: a pretrained encoder, the mean over its tokens, and a linear head."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backbone import Backbone
from text_task import Example, TextTask


class TextClassifier(nn.Module):
    """`head(mean over tokens of encoder(text))`, with an encoder of its own."""

    def __init__(self, backbone: Backbone, outputs: int) -> None:
        super().__init__()
        # A transformers model, to begin with; adapter libraries may wrap it.
        self.encoder: Any = copy.deepcopy(backbone.encoder)
        self.head = nn.Linear(backbone.hidden_size, outputs, device=self.device)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.encoder.parameters()).device
        return device

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Mean of the last hidden states over each text's own tokens, `[N, hidden]`."""
        hidden: Tensor = self.encoder(**inputs).last_hidden_state  # [N, tokens, hidden]
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits or scores, `[N, outputs]`."""
        logits: Tensor = self.head(self.features(inputs))
        return logits


class EncodedTexts:
    """One split of a task, tokenised once; batches are padded to their own longest text."""

    def __init__(
        self, examples: Sequence[Example], task: TextTask, tokenizer: Any, device: torch.device
    ) -> None:
        texts = zip(*(example.texts for example in examples), strict=True)
        self._encoded = tokenizer(*map(list, texts), truncation=True, max_length=task.max_tokens)
        self._tokenizer = tokenizer
        self._device = device
        label_dtype = torch.float32 if task.is_regression else torch.int64
        self.labels = torch.tensor([example.label for example in examples], device=device)
        self.targets = self.labels.to(label_dtype)
        self.lengths = [len(ids) for ids in self._encoded["input_ids"]]

    def __len__(self) -> int:
        return len(self.lengths)

    def inputs(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """The encoder's arguments for these texts."""
        indices = list(indices)
        rows = {key: [column[i] for i in indices] for key, column in self._encoded.items()}
        padded = self._tokenizer.pad(rows, return_tensors="pt")
        return {key: tensor.to(self._device) for key, tensor in padded.items()}

    def longest(self, count: int) -> list[int]:
        """Indices of so many texts with the most tokens."""
        return sorted(range(len(self)), key=self.lengths.__getitem__)[-count:]
