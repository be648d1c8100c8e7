"""Floating-point operations of a forward pass, counted while it runs.

Counted are matrix products, 2 operations for each multiply-add: linear layers, attention (scores and weighted values,
over all pairs of tokens, also where a causal mask discards half of them), convolutions, experts that a token is sent
to. Not counted: element-wise work (norms, activations, softmax, rotary embeddings, state-space scans) and look-ups. The
count is of what PyTorch was asked for; ``torch.utils.flop_counter`` counts the same products one level below, where it
misses the fused attention of CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_TEXT = "Return the element of the sequence at this position, or raise an error where there is none. "


class MatrixProducts(TorchFunctionMode):
    """Within: ``flops`` grows by the operations of each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__name__", "") in _MADE_OF_OTHERS:
            with self:  # written in Python: what it calls is counted
                return func(*args, **given)
        result = func(*args, **given)
        count = _COUNTS.get(getattr(func, "__name__", ""))
        if count is not None and isinstance(result, Tensor):
            self.flops += count(result, *args, **given)
        return result


def flops_per_token(model: SentenceTransformer, length: int) -> tuple[float, int]:
    """Operations for each token of one text.

    Args:
        model: Any encoder, on any device.
        length: Tokens of the text; fewer where the model takes no more. Attention costs more for longer texts.

    Returns:
        Operations for each token, and the tokens that the text had.
    """
    (whole,), width = flops_by_block(model, length, ())
    return whole, width


@torch.inference_mode()
def flops_by_block(model: SentenceTransformer, length: int, blocks: Iterable[nn.Module]) -> tuple[list[float], int]:
    """As :func:`flops_per_token`, of all that is no block first, then of each block."""
    features = model.preprocess([_TEXT * length])
    width = min(length, features["input_ids"].shape[1])
    device = next(model.parameters()).device
    cut = {
        key: value[:, :width].to(device) if isinstance(value, Tensor) and value.ndim == 2 else value
        for key, value in features.items()
    }
    with MatrixProducts() as products, _counters(products, blocks) as inside:
        model(cut)
    return [(products.flops - sum(inside)) / width, *(flops / width for flops in inside)], width


@contextmanager
def _counters(products: MatrixProducts, blocks: Iterable[nn.Module]) -> Iterator[list[int]]:
    """Within: operations counted while a block runs are added to its own."""
    inside: list[int] = []

    def before(index: int, *_: Any) -> None:
        inside[index] -= products.flops

    def after(index: int, *_: Any) -> None:
        inside[index] += products.flops

    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            inside.append(0)
            hooks.callback(block.register_forward_pre_hook(partial(before, index)).remove)
            hooks.callback(block.register_forward_hook(partial(after, index)).remove)
        yield inside


def _product(result: Tensor, first: Tensor, *_: Any, **__: Any) -> int:
    return 2 * result.numel() * first.shape[-1]


def _reversed_product(result: Tensor, second: Tensor, first: Tensor) -> int:
    return _product(result, first)


def _linear(result: Tensor, input: Tensor, *_: Any, **__: Any) -> int:
    return _product(result, input)


def _added_product(result: Tensor, added: Tensor, *factors: Tensor, **named: Any) -> int:
    return _product(result, factors[0] if factors else named["batch1" if "batch1" in named else "mat1"])


def _convolution(result: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * result.numel() * math.prod(weight.shape[1:])


def _attention(result: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


def _einsum(result: Tensor, equation: str, *operands: Any) -> int:
    """Of two tensors: one multiply-add for each combination of their indices; of one, no product."""
    tensors = list(operands[0]) if len(operands) == 1 and not isinstance(operands[0], Tensor) else list(operands)
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    if len(tensors) == 1:
        return 0
    if len(tensors) != 2:
        raise NotImplementedError(f"no count for einsum {equation}")
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, tensors, strict=True):
        before, dots, after = term.partition("...")
        others = tensor.ndim - len(before) - len(after) if dots else 0
        # Those that the dots stand for are counted from the right, as broadcasting does.
        for index, size in zip([*before, *(f"{i}" for i in range(others, 0, -1)), *after], tensor.shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    return 2 * math.prod(sizes.values())


_MADE_OF_OTHERS = ("multi_head_attention_forward", "tensordot")
_COUNTS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm", "mv", "dot", "_grouped_mm", "grouped_mm"), _product),
    "__rmatmul__": _reversed_product,
    "linear": _linear,
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_"), _added_product),
    **dict.fromkeys(("conv1d", "conv2d"), _convolution),
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
}
