"""Parts of a training step that PyTorch is slow at on a CPU, computed otherwise (benchmarks/training_step.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SDPA = "sdpa"


class BitsDropout(nn.Dropout):
    """Dropout by 16 random bits for each number, in place of a draw of its own; ``p`` in steps of 2⁻¹⁶.

    The random numbers of the stock one are a sixth of a step with adapters, each of which has its own dropout.
    """

    def forward(self, numbers: Tensor) -> Tensor:
        """As ``nn.Dropout``, of any shape."""
        if not self.training or self.p == 0:
            return numbers
        count = numbers.numel()
        words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[:count].view(numbers.shape)
        kept = bits >= round(self.p * 2**16) - 2**15
        return numbers * kept.to(numbers.dtype).mul_(1 / (1 - self.p))


def use_bits_dropout(model: nn.Module) -> None:
    """Replace the dropout of all adapters in place, where they are on a CPU."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, dropout in layer.lora_dropout.items():
                if isinstance(dropout, nn.Dropout) and layer.lora_A[name].weight.device.type == "cpu":
                    layer.lora_dropout[name] = BitsDropout(dropout.p)


@contextmanager
def attention_in_float32() -> Iterator[None]:
    """Within: transformers' ``sdpa`` attention leaves autocast, on a CPU.

    Its backward pass takes twice to three times as long in bfloat16.
    """
    ALL_ATTENTION_FUNCTIONS[SDPA] = _attend_in_float32
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[SDPA]  # the stock one stands behind it


def _attend_in_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    def widened(given: Any) -> Any:
        return given.float() if isinstance(given, Tensor) and given.is_floating_point() else given

    options = {name: widened(given) for name, given in options.items()}
    inputs = [widened(given) for given in (query, key, value, attention_mask)]
    with torch.autocast(query.device.type, enabled=False):
        found: tuple[Tensor, None] = sdpa_attention_forward(module, *inputs, **options)
    return found
