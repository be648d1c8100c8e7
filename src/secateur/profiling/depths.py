"""Every depth from one forward pass: the state after each layer, through the model's own final norm and pooling.

The vector at depth k is that of the model cut to its first k layers. :func:`layer_outputs` reads the states by hooks;
:func:`depth_vectors` makes vectors of them for training, with gradients; :class:`DepthEncoder` encodes many texts
for a profile and pools each state as it passes by, so that no hidden states are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from secateur.choosing.selectors import layers_of
from secateur.errors import ConfigError, DataError, IllegalDepth, ModelError, UnsupportedArchitecture
from secateur.measures.metrics import angular_distances, block_influence
from secateur.models import forward
from secateur.models.blocks import blocks_of, final_norm, states_of, tail_is_norm, text_config
from secateur.models.cutting import bypassed, legal_depths
from secateur.models.forward import POOLINGS, pool, pooling_name
from secateur.models.open_model import is_causal
from secateur.runtime.core import halves, is_out_of_memory, plan_batches

Visit = Callable[[int, Tensor, Tensor], None]
"""Called with a depth and the states before and after its layer, both (texts, tokens, width)."""

PROBES = 4
"""Texts on which the shared prefix is compared with the ordinary pass."""


@contextmanager
def layer_outputs(transformer: PreTrainedModel, visit: Visit, depths: Collection[int] | None = None) -> Iterator[None]:
    """Within: ``visit(depth, before, after)`` is called when one of these layers has run; by default, any."""

    def hook(depth: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        visit(depth, args[0] if args else kwargs["hidden_states"], states_of(output))

    with ExitStack() as hooks:
        for depth, layer in enumerate(blocks_of(transformer), start=1):
            if depths is None or depth in depths:
                hooks.callback(layer.register_forward_hook(partial(hook, depth), with_kwargs=True).remove)
        yield


def ends_with_norm(model: SentenceTransformer) -> bool:
    """Whether nothing but a norm follows the layers, so that one pass gives every depth."""
    training = model.training
    try:
        features = batch_to_device(model.eval().preprocess(["A first text", "another"]), model.device)
        return tail_is_norm(model[0].auto_model, {key: features[key] for key in ("input_ids", "attention_mask")})
    finally:
        model.train(training)


def legal_cuts(config: PretrainedConfig, layers: str) -> tuple[int, ...]:
    """The depths that a model can be cut to, ascending, with the layers that a selector takes at each. No weights.

    Raises:
        UnsupportedArchitecture: It cannot be cut at all.
    """
    full = int(text_config(config).num_hidden_layers)
    return legal_depths(config, lambda depth: layers_of(layers, depth, full))


def check_depths(
    model: SentenceTransformer, depths: Sequence[int], option: str = "depths", *, layers: str = "first"
) -> tuple[int, ...]:
    """Depths for :func:`depth_vectors`: ascending, the full depth as the last. ``option`` is where they were asked for.

    Raises:
        ConfigError: A depth is out of range.
        IllegalDepth: The model cannot be cut there.
        UnsupportedArchitecture: More than a norm follows the first layers.
    """
    transformer: PreTrainedModel = model[0].auto_model
    full, legal = len(blocks_of(transformer)), legal_cuts(transformer.config, layers)
    for depth in depths:
        if not 1 <= depth <= full:
            raise ConfigError(option, depth, f"is {depth}", f"the model has {full} layers")
        if depth not in legal:
            raise IllegalDepth(depth, full, "the model cannot be cut there", legal)
    if layers == "first" and not ends_with_norm(model):
        hint = "depths can be trained separately: secateur study --depths"
        raise UnsupportedArchitecture(transformer.name_or_path, "more than a norm follows its layers", hint)
    return (*sorted({*depths} - {full}), full)


def depth_vectors(
    model: SentenceTransformer,
    features: dict[str, Any],
    depths: Sequence[int],
    *,
    layers: str = "first",
    run: nn.Module | None = None,
) -> Tensor:
    """A batch at several depths, (texts, depths, dimension); gradients flow through all of them.

    Args:
        model: In training or in evaluation mode.
        features: What ``model.preprocess`` gave.
        depths: From :func:`check_depths`.
        layers: The selector that says which layers a depth has; each but ``first`` takes a pass for each depth.
        run: What is called in place of ``model``, such as the wrapper of several processes around it.
    """
    transformer: PreTrainedModel = model[0].auto_model
    whole, full = run or model, len(blocks_of(transformer))
    if layers != "first":
        found = []
        for depth in depths:
            with bypassed(transformer, layers_of(layers, depth, full)):
                found.append((whole if depth == full else model)(dict(features))["sentence_embedding"])
        return torch.stack(found, dim=1)
    states: dict[int, Tensor] = {}

    def keep(depth: int, before: Tensor, after: Tensor) -> None:
        # Pooled after the pass: with gradient checkpointing, a layer must do the same when it is run again.
        states[depth] = after

    inner = [depth for depth in depths if depth != full]
    with layer_outputs(transformer, keep, inner):
        last: Tensor = whole(dict(features))["sentence_embedding"]
    norm, dtype = final_norm(transformer), transformer.dtype
    vectors = {depth: pool(model, norm(states[depth].to(dtype)), features).to(last.dtype) for depth in inner}
    return torch.stack([vectors.get(depth, last) for depth in depths], dim=1)


@dataclass(frozen=True)
class Depths:
    """Some texts at every depth.

    Attributes:
        rows: Which of the texts given, in the order of ``vectors``.
        vectors: Pooled vectors (texts, depths, dimension) in float32.
        influence: (depths,), per layer the sum over tokens of 1 − cosine(input, output).
        tokens: How many tokens that sum runs over.
        angles: (depths + 1, depths + 1), per pair of depths from 0 (the embeddings) on, the angular distance of the
            last tokens' states, summed over texts; None where states have another layout.
    """

    rows: tuple[int, ...]
    vectors: Tensor
    influence: Tensor
    tokens: int
    angles: Tensor | None = None


@dataclass(frozen=True)
class _Prefix(forward.Prefix):
    """What all texts start with; and per layer its normed states and its Block Influence."""

    normed: list[Tensor]
    influence: Tensor


class DepthEncoder:
    """Encodes texts at every depth, each with one forward pass.

    Where more than a norm follows the layers, each depth takes a pass of its own. An instruction that all texts start
    with is computed once, if the model's vectors stay the same. ``notes`` tells what a reader of the results must know.

    Args:
        model: An opened model in evaluation mode.
        budget: Tokens in a batch, padding included; a batch that does not fit into memory halves it.
        name: What the user calls the model, for errors.
    """

    def __init__(self, model: SentenceTransformer, *, budget: int = forward.BUDGET, name: str = "model") -> None:
        self.model, self.name, self._budget = model, name, budget
        self._transformer: PreTrainedModel = model[0].auto_model
        self._norm = final_norm(self._transformer)
        self.depth = len(blocks_of(self._transformer))
        self.notes: list[str] = []
        self.pooling = pooling_name(model)
        self._one_pass = ends_with_norm(model)
        if not self._one_pass:
            self.notes.append("more than a norm follows the layers of this model: each depth took a pass of its own")
        self._weighs = isinstance(model[1], Pooling) and self.pooling in ("l3prune", *POOLINGS)
        self._shares = self._one_pass and is_causal(model[0])
        self._prefix: _Prefix | None = None

    @property
    def bytes_per_text(self) -> int:
        """Size of a text's vectors."""
        return self.depth * int(self.model.get_embedding_dimension()) * 4

    @torch.no_grad()
    def run(self, texts: Sequence[str], prompt: str = "") -> Iterator[Depths]:
        """Encode texts, at least one, the longest first; yields those of one batch at every depth.

        Raises:
            ModelError: Vectors are not finite, or a single text is too large for the memory.
            DataError: A text has no tokens, or its prompt leaves no room for them.
        """
        tokens = forward.tokenize(self.model, texts, prompt)
        if prompt and self.pooling == "l3prune":
            # The blank that ends the paper's prompt belongs to the word after it, where a tokenizer joins them.
            tokens["prompt_length"] = self.model.preprocess(["a"], prompt=prompt.rstrip())["prompt_length"]
        lengths = forward.lengths_of(tokens)
        before = tokens.get("prompt_length", 0)
        if not getattr(self.model[1], "include_prompt", True) and bool((lengths <= before).any()):
            problem = f"of a text nothing is left to pool after {before} tokens: its prompt fills them all"
            raise DataError("texts", problem, "shorten the instruction, or raise --max-length")
        prefix = self._share(tokens)
        for rows in plan_batches((lengths - (len(prefix.ids) if prefix else 0)).tolist(), self._budget):
            for found in self._fit(tokens, rows, prefix):
                finite = found.vectors.isfinite().all(dim=2).all(dim=0)
                if not bool(finite.all()):
                    problem = f"gives vectors that are not finite at depth {int(finite.long().argmin()) + 1}"
                    raise ModelError(self.name, problem, "its weights hold NaN, or overflow in this dtype")
                yield replace(found, vectors=found.vectors[..., : self.model.truncate_dim])

    def _fit(self, tokens: dict[str, Any], rows: list[int], prefix: _Prefix | None) -> Iterator[Depths]:
        """Read a batch, in halves where it does not fit into memory."""
        try:
            found = self._read(tokens, rows, prefix) if self._one_pass else self._read_each(tokens, rows)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                problem = f"a text of {int(forward.lengths_of(tokens)[rows[0]])} tokens does not fit into memory"
                raise ModelError(self.name, problem, "lower --max-length") from None
        else:
            yield found
            return
        self._budget = max(1, self._budget // 2)
        self.notes = list(dict.fromkeys([*self.notes, "a batch was too large for the memory and was halved"]))
        for half in halves(rows):
            yield from self._fit(tokens, list(half), prefix)

    def _share(self, tokens: dict[str, Any]) -> _Prefix | None:
        """What all texts start with, computed once; None where it is short, or the vectors would not be the same."""
        order = forward.lengths_of(tokens).argsort().tolist()
        if not self._shares or len(order) <= 2 * PROBES:
            return None
        start, known = forward.common_start(tokens), self._prefix
        if known is not None and torch.equal(start[: len(known.ids)], known.ids):
            return known
        if len(start) < forward.SHORTEST_PREFIX:
            return None
        rows = [order[i * (len(order) - 1) // (PROBES - 1)] for i in range(PROBES)]  # from the shortest to the longest
        try:
            prefix = self._run_prefix(start)
            plain, quick = (self._read(tokens, rows, own).vectors for own in (None, prefix))
        except (MemoryError, *forward.REFUSALS):
            same = False
        else:
            allowed = 1e-4 if self._transformer.dtype == torch.float32 else 3e-2
            close = (quick - plain).norm(dim=-1) <= allowed * plain.norm(dim=-1)
            # Vectors that are not finite agree with anything: they are reported by the caller.
            same = bool(close.all()) or not bool(plain.isfinite().all())
        if same:
            self._prefix = prefix
            return prefix
        self._shares = False
        self.notes.append("the instruction was computed for each text anew: computed once, it gives other vectors")
        return None

    def _run_prefix(self, start: Tensor) -> _Prefix:
        normed: list[Tensor] = []
        influence: list[Tensor] = []
        mask = torch.ones(1, len(start), device=self.model.device)

        def visit(depth: int, before: Tensor, after: Tensor) -> None:
            normed.append(self._norm(after))
            influence.append(block_influence(before, after, mask))

        with layer_outputs(self._transformer, visit):
            found = forward.run_prefix(self._transformer, start)
        return _Prefix(**vars(found), normed=normed, influence=torch.stack(influence).cpu().double())

    def _read(self, tokens: dict[str, Any], rows: list[int], prefix: _Prefix | None) -> Depths:
        """One pass over a batch; with a prefix, over what follows it."""
        features = batch_to_device(forward.batch_of(tokens, rows), self.model.device)
        skipped = len(prefix.ids) if prefix else 0
        mask = features["attention_mask"][:, skipped:]
        each, last = torch.arange(len(mask)), (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
        vectors: list[Tensor] = []
        influence: list[Tensor] = []
        ends: list[Tensor] = []
        weights = self._weights(features) if self._weighs else None

        def visit(depth: int, before: Tensor, after: Tensor) -> None:
            normed = self._norm(after)
            whole = normed
            if prefix:
                whole = torch.cat([prefix.normed[depth - 1].expand(len(rows), -1, -1), normed], dim=1)
            vectors.append(self._pool(whole, features, weights))
            influence.append(block_influence(before, after, mask))
            ends.extend(state[each, last] for state in ((before, after) if depth == 1 else (after,)))

        with layer_outputs(self._transformer, visit):
            if prefix:
                forward.run_after(self._transformer, prefix, features)
            else:
                self.model[0](dict(features))
        influences = torch.stack(influence).cpu().double()  # in this order, for MPS has no float64
        return Depths(
            rows=tuple(rows),
            vectors=torch.stack(vectors, dim=1).cpu(),
            influence=influences + len(rows) * prefix.influence if prefix else influences,
            tokens=int(features["attention_mask"].sum()),
            angles=(angular_distances(torch.stack(ends, dim=1)) * len(rows)).cpu().double(),
        )

    def _weights(self, features: dict[str, Any]) -> Tensor:
        """What the pooling multiplies the tokens of each text with, (texts, tokens).

        The :data:`.POOLINGS` are weighted sums of states, so that what they make of unit vectors are their weights: the
        pooling is asked once for a batch, and a matrix product pools every depth.
        """
        texts, tokens = features["attention_mask"].shape
        units = torch.eye(tokens, device=self.model.device).expand(texts, -1, -1)
        weights: Tensor = self.model[1](dict(features, token_embeddings=units))["sentence_embedding"]
        return weights

    def _pool(self, states: Tensor, features: dict[str, Any], weights: Tensor | None) -> Tensor:
        """What the pooling, and the modules after it, make of normed states: (texts, dimension)."""
        first, current = self.model[1], dict(features)
        if weights is not None:
            current["sentence_embedding"] = (weights[:, None] @ states.float())[:, 0]
        else:
            current = first(current | {"token_embeddings": states.float() if isinstance(first, Pooling) else states})
        for module in list(self.model)[2:]:
            weight = next(module.parameters(), None)
            if weight is not None:
                current["sentence_embedding"] = current["sentence_embedding"].to(weight.dtype)
            current = module(current)
        vectors: Tensor = current["sentence_embedding"].float()
        return vectors

    def _read_each(self, tokens: dict[str, Any], rows: list[int]) -> Depths:
        """One pass for each depth, the later layers bypassed."""
        features = batch_to_device(forward.batch_of(tokens, rows), self.model.device)
        mask = features["attention_mask"]
        vectors: list[Tensor] = []
        influence = torch.zeros(self.depth, dtype=torch.float64)

        def visit(depth: int, before: Tensor, after: Tensor) -> None:
            real = mask
            # These layers may keep several streams or another layout: every state counts the same.
            if before.shape[:-1] != mask.shape:
                real = torch.ones(before.shape[:-1], device=before.device) * (mask.sum() / before.shape[:-1].numel())
            influence[depth - 1] = block_influence(before, after, real).cpu()  # the last pass stays

        for depth in range(1, self.depth + 1):
            with layer_outputs(self._transformer, visit), bypassed(self._transformer, range(depth)):
                vectors.append(self.model(dict(features))["sentence_embedding"].float().cpu())
        return Depths(tuple(rows), torch.stack(vectors, 1), influence, int(mask.sum()))
