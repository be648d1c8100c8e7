"""Linear layers that multiply in bfloat16, while everything between them stays in float32.

What that rounds shows in texts of a few tokens, whose states can fall to one side or the other in the first blocks; in
longer ones it averages out. So texts that are short may run some of the first blocks, or all, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.models.blocks import blocks_of

ROWS_STEP = 16
"""Rows of a product in bfloat16 are filled up to a multiple of this: oneDNN keeps a kernel for each number of rows."""


@dataclass(frozen=True)
class Spared:
    """Texts of fewer tokens than ``below``, those of a prompt included, run their first ``blocks`` in float32."""

    below: int
    blocks: int


@dataclass
class _Switch:
    """How many blocks of the batch that runs now multiply in float32."""

    exact: int = 0


class MixedLinear(nn.Module):
    """A linear layer that multiplies in bfloat16, adds up in float32 and hands on float32.

    Only its weights and inputs are rounded. What a model adds up over its blocks is not: rounding that is what makes
    the vectors of a model in bfloat16 differ.

    Args:
        linear: The layer in float32; kept, and used instead, where there is a switch.
        block: Its place in the model.
        switch: What says which blocks use their layers in float32.
    """

    def __init__(self, linear: nn.Linear, block: int = 0, switch: _Switch | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().to(torch.bfloat16), requires_grad=False)
        self.bias = linear.bias
        self._block, self._switch = block, switch
        self._linear = [linear] if switch else []  # in a list, it is not a part of the model

    def _apply(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> MixedLinear:
        """Where the model is moved, the float32 layer goes with it."""
        for linear in self._linear:
            linear._apply(change, recurse)  # type: ignore[no-untyped-call]
        super()._apply(change, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, states: Tensor) -> Tensor:
        """States (…, in) → (…, out), both float32."""
        if self._switch and self._block < self._switch.exact:
            exact: Tensor = self._linear[0](states)
            return exact
        rows = states.reshape(-1, self.in_features)
        rounded = rows.new_empty(-(-len(rows) // ROWS_STEP) * ROWS_STEP, self.in_features, dtype=torch.bfloat16)
        rounded[: len(rows)] = rows
        rounded[len(rows) :] = 0
        product = nn.functional.linear(rounded, self.weight)[: len(rows)].float()
        product = product.view(*states.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


def use_mixed_products(model: SentenceTransformer, spared: Sequence[Spared] = ()) -> Callable[[], None]:
    """Replace the linear layers in the blocks of a float32 model by :class:`MixedLinear`.

    Args:
        model: Changed in place.
        spared: From few tokens to many. A batch goes by its shortest text. Blocks that are spared keep their float32
            weights beside the others, half as much memory again.

    Returns:
        What puts the layers back.
    """
    linears = [
        (number, parent, name, child)
        for number, block in enumerate(blocks_of(model[0].auto_model))
        for parent in list(block.modules())
        for name, child in list(parent.named_children())
        if type(child) is nn.Linear
    ]
    switch = _Switch()
    most = max((some.blocks for some in spared), default=0)
    for number, parent, name, linear in linears:
        setattr(parent, name, MixedLinear(linear, number, switch if number < most else None))
    hooks = _watch(model, switch, spared) if most else []

    def undo() -> None:
        for _, parent, name, linear in linears:
            setattr(parent, name, linear)
        for hook in hooks:
            hook.remove()

    return undo


def _watch(model: SentenceTransformer, switch: _Switch, spared: Sequence[Spared]) -> list[RemovableHandle]:
    """Set the switch before each batch, by its shortest text.

    sentence-transformers calls its module with a dictionary, and that the transformer's ``forward`` by name; what runs
    texts after a prefix calls the transformer itself.
    """

    def look(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        features = args[0] if args and isinstance(args[0], Mapping) else named
        mask = features.get("attention_mask")
        tokens = features["input_ids"].shape[1] if mask is None else int(mask.sum(dim=1).min())
        switch.exact = next((some.blocks for some in spared if tokens < some.below), 0)

    return [module.register_forward_pre_hook(look, with_kwargs=True) for module in (model[0], model[0].auto_model)]


def is_mixed(model: nn.Module) -> bool:
    """Whether some of a model's layers multiply in bfloat16 alone."""
    return any(isinstance(module, MixedLinear) for module in model.modules())
