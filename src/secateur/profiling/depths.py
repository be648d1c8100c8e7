"""Every depth from one forward pass: the state after each layer, through the model's own final norm and pooling.

The vector at depth k is that of the model cut to its first k layers. :func:`layer_outputs` reads the states by hooks;
:func:`depth_vectors` makes vectors of them for training, with gradients; :class:`DepthEncoder` encodes many texts
for a profile and pools each state as it passes by, so that no hidden states are kept.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from secateur.choosing.selectors import layers_of
from secateur.errors import ConfigError, DataError, IllegalDepth, ModelError, UnsupportedArchitecture
from secateur.measures.metrics import angular_distances, block_influence
from secateur.models import forward
from secateur.models.blocks import blocks_of, final_norm, states_of, tail_is_norm, text_config
from secateur.models.cutting import bypassed, legal_depths
from secateur.models.forward import POOLINGS, L3PrunePooling, make_pooling, pool, pooling_name
from secateur.models.open_model import is_causal
from secateur.profiling.lens import next_token_positions
from secateur.runtime.core import plan_batches

Visit = Callable[[int, Tensor, Tensor], None]
"""Called with a depth and the states before and after its layer, both (texts, tokens, width)."""

LINEAR = ("mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", "cls")
"""Poolings of sentence-transformers that are a weighted sum of the tokens' states."""
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
        features = model.eval().preprocess(["A first text", "another"])
        inputs = {name: features[name].to(model.device) for name in ("input_ids", "attention_mask")}
        return tail_is_norm(model[0].auto_model, inputs)
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
    """A batch at several depths, of the first layers from one pass; gradients flow through all of them.

    Args:
        model: In training or in evaluation mode.
        features: What ``model.preprocess`` gave.
        depths: From :func:`check_depths`.
        layers: The selector that says which layers a depth has; each but ``first`` takes a pass for each depth.
        run: What is called in place of ``model``, such as the wrapper of several processes around it.

    Returns:
        (texts, depths, dimension).
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
        vectors: Pooled vectors (texts, poolings, depths, dimension) in float32; the model's own pooling is the first.
        influence: (depths,), per layer the sum over tokens of 1 − cosine(input, output).
        tokens: How many tokens that sum runs over.
        angles: (depths + 1, depths + 1), per pair of depths from 0 (the embeddings) on, the angular distance of the
            last tokens' states, summed over texts; None where states have another layout.
        states: (sampled, depths, width), the normed states of sampled tokens.
        targets: (sampled,), the token that follows each.
    """

    rows: tuple[int, ...]
    vectors: Tensor
    influence: Tensor
    tokens: int
    angles: Tensor | None
    states: Tensor
    targets: Tensor


@dataclass(frozen=True)
class _Prefix:
    """What all texts start with: its keys and values, and per layer its normed states and its Block Influence."""

    ids: Tensor
    cache: DynamicCache
    normed: list[Tensor]
    influence: Tensor


class DepthEncoder:
    """Encodes texts at every depth, each with one forward pass.

    Where more than a norm follows the layers, each depth takes a pass of its own. An instruction that all texts start
    with is computed once, if the model's vectors stay the same. ``poolings`` names the poolings used, the model's own
    first; ``notes`` tells what a reader of the results must know.

    Args:
        model: An opened model in evaluation mode.
        every_pooling: Use all of :data:`.POOLINGS`, where the model's own is a weighted sum of its tokens.
        budget: Tokens in a batch, padding included; a batch that does not fit into memory halves it.
        name: What the user calls the model, for errors.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        every_pooling: bool = False,
        budget: int = forward.BUDGET,
        name: str = "model",
    ) -> None:
        self._model, self._name, self._budget = model, name, budget
        self._transformer: PreTrainedModel = model[0].auto_model
        self._norm = final_norm(self._transformer)
        self.depth = len(blocks_of(self._transformer))
        self.notes: list[str] = []
        self.poolings: tuple[str, ...] = (pooling_name(model),)
        self._heads: list[Pooling] = []
        first: Any = model[1] if len(model) > 1 else None
        self._one_pass = ends_with_norm(model)
        if not self._one_pass:
            self.notes.append("more than a norm follows the layers of this model: each depth took a pass of its own")
        elif type(first) in (Pooling, L3PrunePooling) and first.pooling_mode in LINEAR:
            others = [name for name in POOLINGS if name != self.poolings[0]] if every_pooling else []
            self.poolings += (*others,)
            self._heads = [first, *(make_pooling(name, first.embedding_dimension) for name in others)]  # type: ignore[arg-type]
        self._shares = bool(self._heads) and is_causal(model[0])
        self._prefix: _Prefix | None = None

    @property
    def bytes_per_text(self) -> int:
        """Size of a text's vectors."""
        return len(self.poolings) * self.depth * int(self._model.get_embedding_dimension()) * 4

    @torch.no_grad()
    def run(
        self, texts: Sequence[str], prompt: str = "", sampled: Collection[int] = (), seed: int = 0
    ) -> Iterator[Depths]:
        """Encode texts, at least one, the longest first; yields those of one batch at every depth.

        Of the texts at the indices ``sampled``, one token's states are kept, drawn by ``seed``.

        Raises:
            ModelError: Vectors are not finite, or a single text is too large for the memory.
            DataError: A text has no tokens, or its prompt leaves no room for them.
        """
        tokens = forward.tokenize(self._model, texts, prompt)
        if prompt and self.poolings[0] == "l3prune":
            # The blank that ends the paper's prompt belongs to the word after it, where a tokenizer joins them.
            tokens.features["prompt_length"] = self._model.preprocess(["a"], prompt=prompt.rstrip())["prompt_length"]
        prefix = self._share(tokens)
        picks = {row: random.Random(f"{seed} {texts[row]}").random() for row in sampled}  # noqa: S311
        todo = deque(plan_batches((tokens.lengths - (len(prefix.ids) if prefix else 0)).tolist(), self._budget))
        while todo:
            rows = todo.popleft()
            try:
                found = self._read(tokens, rows, prefix, picks) if self._one_pass else self._read_each(tokens, rows)
            except (MemoryError, RuntimeError) as error:
                if not forward.is_out_of_memory(error):
                    raise
                if len(rows) == 1:
                    problem = f"a text of {int(tokens.lengths[rows[0]])} tokens does not fit into memory"
                    raise ModelError(self._name, problem, "lower --max-length") from None
                self._budget = max(1, self._budget // 2)
                self.notes = list(dict.fromkeys([*self.notes, "a batch was too large for the memory and was halved"]))
                todo.extendleft(list(half) for half in reversed([*forward.halves(rows)]))
                continue
            finite = found.vectors[:, 0].isfinite().all(dim=2).all(dim=0)
            if not bool(finite.all()):
                problem = f"gives vectors that are not finite at depth {int(finite.long().argmin()) + 1}"
                raise ModelError(self._name, problem, "its weights hold NaN, or overflow in this dtype")
            yield replace(found, vectors=found.vectors[..., : self._model.truncate_dim])

    def _share(self, tokens: forward.Tokens) -> _Prefix | None:
        """What all texts start with, computed once; None where the vectors would not be the same."""
        if not self._shares or len(tokens.lengths) <= 2 * PROBES:
            return None
        start, known = forward.common_start(tokens), self._prefix
        if known is not None and torch.equal(start[: len(known.ids)], known.ids):
            return known
        if len(start) < forward.SHORTEST_PREFIX:
            return None
        order = tokens.lengths.argsort().tolist()
        rows = [order[i * (len(order) - 1) // (PROBES - 1)] for i in range(PROBES)]  # from the shortest to the longest
        normed: list[Tensor] = []
        influence: list[Tensor] = []
        mask = torch.ones(1, len(start), device=self._model.device)

        def visit(depth: int, before: Tensor, after: Tensor) -> None:
            normed.append(self._norm(after)[0].float())
            influence.append(block_influence(before, after, mask))

        try:
            plain = self._read(tokens, rows, None, {}).vectors
            with layer_outputs(self._transformer, visit):
                cache = forward.run_prefix(self._transformer, start)
            prefix = _Prefix(start, cache, normed, torch.stack(influence).double().cpu())
            error = (self._read(tokens, rows, prefix, {}).vectors - plain).norm(dim=-1)
            allowed = 1e-4 if self._transformer.dtype == torch.float32 else 3e-2
            # Vectors that are not finite agree with anything: they are reported by the caller.
            if bool((error <= allowed * plain.norm(dim=-1)).all()) or not bool(plain.isfinite().all()):
                self._prefix = prefix
                return prefix
        except (MemoryError, *forward.REFUSALS) as error:
            if forward.is_out_of_memory(error):
                return None  # the batches themselves are halved until they fit
        self._shares = False
        self.notes.append("the instruction was computed for each text anew: this model gives other vectors otherwise")
        return None

    def _read(self, tokens: forward.Tokens, rows: list[int], prefix: _Prefix | None, picks: dict[int, float]) -> Depths:
        """One pass over a batch; with a prefix, over what follows it."""
        features = self._features(tokens, rows, left=False if prefix else None)
        skipped = len(prefix.ids) if prefix else 0
        mask = features["attention_mask"][:, skipped:]
        each, last = torch.arange(len(mask)), (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(dim=1)
        weights = self._weights(features) if self._heads else None
        text, place = next_token_positions(features, skipped, [picks.get(row) for row in rows])
        vectors: list[Tensor] = []
        influence: list[Tensor] = []
        ends: list[Tensor] = []
        states: list[Tensor] = []

        def visit(depth: int, before: Tensor, after: Tensor) -> None:
            normed = self._norm(after)
            if weights is None:
                vectors.append(pool(self._model, normed, features).float()[:, None])
            else:
                pooled = weights[:, :, skipped:] @ normed.float()
                if prefix:
                    pooled = pooled + weights[:, :, :skipped] @ prefix.normed[depth - 1]
                vectors.append(self._finish(pooled, normed.dtype))
            influence.append(block_influence(before, after, mask))
            ends.extend(state[each, last] for state in ((before, after) if depth == 1 else (after,)))
            states.append(normed[text, place])

        with layer_outputs(self._transformer, visit):
            if prefix:
                forward.run_after(self._transformer, prefix.cache, skipped, features)
            else:
                self._model[0](dict(features))
        influences = torch.stack(influence).double().cpu()
        return Depths(
            rows=tuple(rows),
            vectors=torch.stack(vectors, dim=2).cpu(),
            influence=influences + len(rows) * prefix.influence if prefix else influences,
            tokens=int(features["attention_mask"].sum()),
            angles=(angular_distances(torch.stack(ends, dim=1)) * len(rows)).double().cpu(),
            states=torch.stack(states, dim=1),
            targets=features["input_ids"][text, place + skipped + 1],
        )

    def _read_each(self, tokens: forward.Tokens, rows: list[int]) -> Depths:
        """One pass for each depth, the later layers bypassed."""
        features = self._features(tokens, rows)
        mask = features["attention_mask"]
        vectors: list[Tensor] = []
        influence: dict[int, float] = {}

        def visit(depth: int, before: Tensor, after: Tensor) -> None:
            real = mask
            # These layers may keep several streams or another layout: every state counts the same.
            if before.shape[:-1] != mask.shape:
                real = torch.ones(before.shape[:-1], device=before.device) * (mask.sum() / before.shape[:-1].numel())
            influence[depth] = float(block_influence(before, after, real))  # the last pass stays

        for depth in range(1, self.depth + 1):
            with layer_outputs(self._transformer, visit), bypassed(self._transformer, range(depth)):
                vectors.append(self._model(dict(features))["sentence_embedding"].float().cpu())
        sums = torch.tensor([influence[depth] for depth in range(1, self.depth + 1)], dtype=torch.float64)
        none, targets = torch.zeros(0, self.depth, 1), torch.zeros(0, dtype=torch.long)
        return Depths(tuple(rows), torch.stack(vectors, 1)[:, None], sums, int(mask.sum()), None, none, targets)

    def _features(self, tokens: forward.Tokens, rows: list[int], left: bool | None = None) -> dict[str, Any]:
        features = tokens.batch(rows, left=left)
        return {key: v.to(self._model.device) if isinstance(v, Tensor) else v for key, v in features.items()}

    def _weights(self, features: dict[str, Any]) -> Tensor:
        """The weight of each token's state in each pooled vector: (texts, poolings, tokens).

        A weighted sum's derivative by a state is its weight: so the arithmetic is the pooling modules' own.
        """
        mask = features["attention_mask"]
        found = []
        for pooling in self._heads:
            with torch.enable_grad():
                states = torch.ones(*mask.shape, 1, device=mask.device, requires_grad=True)
                pooled = pooling(dict(features, token_embeddings=states))["sentence_embedding"]
                found.append(torch.autograd.grad(pooled.sum(), states)[0].squeeze(-1))
        if bool((found[0].sum(dim=1) == 0).any()):
            problem = f"of a text nothing is left to pool after {mask.shape[1]} tokens: its prompt fills them all"
            raise DataError("texts", problem, "shorten the instruction, or raise --max-length")
        return torch.stack(found, dim=1)

    def _finish(self, pooled: Tensor, dtype: torch.dtype) -> Tensor:
        """What the modules after the pooling make of (texts, poolings, width): (texts, poolings, dimension)."""
        current: dict[str, Any] = {"sentence_embedding": pooled.flatten(0, 1)}
        for module in list(self._model)[2:]:
            if next(module.parameters(), None) is not None:
                current["sentence_embedding"] = current["sentence_embedding"].to(dtype)
            current = module(current)
        vectors: Tensor = current["sentence_embedding"]
        return vectors.float().reshape(*pooled.shape[:2], -1)
