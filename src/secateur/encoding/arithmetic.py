"""In what number format a model multiplies: float32, or bfloat16 where that keeps its vectors.

Where the processor multiplies bfloat16 faster, linear layers may do so, while everything between them stays in float32
(:class:`MixedLinear`). What that rounds shows in texts of a few tokens, whose states can fall to one side or the other;
in longer ones it averages out. So texts that are shorter than a measured number of tokens stay in float32 as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.architectures.blocks import blocks_of
from secateur.architectures.forward import block_seconds
from secateur.checkpoints.verify import PROBES
from secateur.loading.models import open_model
from secateur.measures.metrics import paired_cosines

ROWS_STEP = 16
"""Rows of a product in bfloat16 are filled up to a multiple of this: oneDNN keeps a kernel for each number of rows."""

WORTH = 1.1
"""How many times as fast another number format must be to be taken."""

LEAST_COSINE = 0.9999
"""To the vectors of float32: below it, a quicker format is not taken unless it is asked for."""

MIXED = "mixed"

SHORTEST = (0, 8, 16, 24, 32)
"""Texts of fewer tokens than one of these may stay in float32 for the sake of :data:`LEAST_COSINE`."""

RANDOM_LENGTHS = [1, 2, 3, 4] * 24 + [5, 6, 7] * 8 + [8, 12] * 8 + [16, 20, 24, 28] * 12
"""Tokens in each text of random ones on which rounding is measured: most are few. Longer texts are language."""


@dataclass
class _Switch:
    """Whether the batch that runs now is multiplied in float32."""

    exact: bool = False


class MixedLinear(nn.Module):
    """A linear layer that multiplies in bfloat16, adds up in float32 and hands on float32.

    Only its weights and inputs are rounded. What a model adds up over its blocks is not: rounding that is what makes
    the vectors of a model in bfloat16 differ.
    """

    def __init__(self, linear: nn.Linear, switch: _Switch | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().to(torch.bfloat16), requires_grad=False)
        self.bias = linear.bias
        self._switch = switch
        self._linear = [linear] if switch else []  # in a list, it is not a part of the model

    def _apply(self, change: Callable[[Tensor], Tensor], recurse: bool = True) -> MixedLinear:
        """Where the model is moved, the float32 layer goes with it."""
        for linear in self._linear:
            linear._apply(change, recurse)  # type: ignore[no-untyped-call]
        super()._apply(change, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, states: Tensor) -> Tensor:
        """States (…, in) → (…, out), both float32."""
        if self._switch and self._switch.exact:
            exact: Tensor = self._linear[0](states)
            return exact
        rows = states.reshape(-1, self.in_features)
        rounded = rows.new_empty(-(-len(rows) // ROWS_STEP) * ROWS_STEP, self.in_features, dtype=torch.bfloat16)
        rounded[: len(rows)] = rows
        rounded[len(rows) :] = 0
        product = nn.functional.linear(rounded, self.weight)[: len(rows)].float()
        product = product.view(*states.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


def use_mixed_products(model: SentenceTransformer, shortest: int = 0) -> Callable[[], None]:
    """Replace the linear layers in the blocks of a float32 model by :class:`MixedLinear`.

    Args:
        model: Changed in place.
        shortest: A batch with a text of fewer tokens than this, those of its prompt included, stays in float32; the
            float32 weights are then kept beside the others, half as much memory again.

    Returns:
        What puts the layers back.
    """
    transformer = model[0].auto_model
    linears = [
        (parent, name, child)
        for block in blocks_of(transformer)
        for parent in list(block.modules())
        for name, child in list(parent.named_children())
        if type(child) is nn.Linear
    ]
    switch = _Switch() if shortest else None
    for parent, name, linear in linears:
        setattr(parent, name, MixedLinear(linear, switch))

    hooks = _watch(model, switch, shortest) if switch else []

    def undo() -> None:
        for parent, name, linear in linears:
            setattr(parent, name, linear)
        for hook in hooks:
            hook.remove()

    return undo


def _watch(model: SentenceTransformer, switch: _Switch, shortest: int) -> list[RemovableHandle]:
    """Set the switch before each batch, by its shortest text.

    sentence-transformers calls its module with a dictionary, and that the transformer's ``forward`` by name; what runs
    texts after a prefix calls the transformer itself.
    """

    def look(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        features = args[0] if args and isinstance(args[0], Mapping) else named
        mask = features.get("attention_mask")
        tokens = features["input_ids"].shape[1] if mask is None else int(mask.sum(dim=1).min())
        switch.exact = tokens < shortest

    return [module.register_forward_pre_hook(look, with_kwargs=True) for module in (model[0], model[0].auto_model)]


def open_for_encoding(name: str, dtype: str, **options: Any) -> tuple[SentenceTransformer, str]:
    """Open a model that multiplies as ``dtype`` says, a name for :func:`use_arithmetic`; and that name, settled.

    Args:
        name: Of the model.
        dtype: How it multiplies.
        **options: As for :func:`.open_model`, and so with its errors.
    """
    model = open_model(name, dtype="float32" if dtype.startswith(MIXED) else dtype, **options)
    return model, use_arithmetic(model, dtype)


def use_arithmetic(model: SentenceTransformer, name: str) -> str:
    """Make an opened model multiply as ``name`` says, and return that name: ``auto`` becomes what it stands for.

    Args:
        model: In the number format of that name, or in float32 for ``mixed``; changed in place.
        name: ``auto`` (:func:`quicken`); ``mixed``, or ``mixed:16``: linear layers multiply in bfloat16, but for texts
            of fewer than 16 tokens; or a number format, with which nothing changes.
    """
    if name == "auto":
        return quicken(model)
    if name.startswith(MIXED):
        use_mixed_products(model, int(name.partition(":")[2] or 0))
    return name


def quicken(model: SentenceTransformer) -> str:
    """Give a model the quickest arithmetic that keeps its vectors, by measurement on this processor.

    A float32 model gets mixed products where bfloat16 is quicker, for all texts or for those that are not too short:
    the first of :data:`SHORTEST` from which on all of :func:`probe_texts` keep :data:`LEAST_COSINE`. A model in another
    format goes to float32 where that is quicker. On a GPU nothing changes.

    Returns:
        A name for :func:`use_arithmetic`.
    """
    if model.device.type == "cpu":
        seconds = block_seconds(model)
        gain = seconds[torch.float32] / seconds[torch.bfloat16]
        if model.dtype == torch.float32 and gain > WORTH:
            shortest = _shortest_that_keeps(model)
            if shortest is not None:
                return use_arithmetic(model, f"{MIXED}:{shortest}" if shortest else MIXED)
        elif model.dtype != torch.float32 and gain * WORTH < 1:
            model.float()
    return str(model.dtype).removeprefix("torch.")


def _shortest_that_keeps(model: SentenceTransformer) -> int | None:
    """From how many tokens on mixed products keep every probe's vector; None where no length is enough."""
    texts = probe_texts(model)
    lengths = np.array([len(ids) for ids in model.tokenizer(texts)["input_ids"]])
    exact = _vectors(model, texts)
    undo = use_mixed_products(model)
    kept = paired_cosines(_vectors(model, texts), exact) >= LEAST_COSINE
    undo()
    return next((shortest for shortest in SHORTEST if kept[lengths >= shortest].all()), None)


def probe_texts(model: SentenceTransformer) -> list[str]:
    """Texts on which rounding shows: random tokens, which no weights were trained for, and sentences under each prompt.

    A few tokens average out little of what is rounded, so most of them are short.
    """
    rng = np.random.default_rng(0)
    tokens = sorted(set(model.tokenizer.get_vocab().values()) - set(model.tokenizer.all_special_ids))
    made = [model.tokenizer.decode(rng.choice(tokens, length).tolist()) for length in RANDOM_LENGTHS]
    prompts = sorted({"", *model.prompts.values()})
    return [*made, *(prompt + text for prompt in prompts for text in (*PROBES, " ".join(PROBES)))]


def _vectors(model: SentenceTransformer, texts: list[str]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = model.encode(texts, prompt="", show_progress_bar=False)
    return found
