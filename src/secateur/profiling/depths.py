"""One forward pass, every depth: the state after each block, normed and pooled as it passes by.

The vector at depth k is the vector of the model cut to its first k blocks. Hooks on the blocks take each block's
output through the model's own final norm and pooling at once, so that no hidden states are kept.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import DataError, ModelError
from secateur.measures.metrics import angular_distances, block_influence
from secateur.models.blocks import blocks_of, final_norm, find_stack, states_of
from secateur.models.forward import (
    BUDGET,
    REFUSALS,
    SHORTEST_PREFIX,
    SharedPrefix,
    Tokens,
    common_start,
    halves,
    is_out_of_memory,
    plan_evenly,
    run_after,
    run_prefix,
    tokenize,
)
from secateur.models.open_model import is_causal
from secateur.models.pooling import POOLINGS, make_pooling, pool, pooling_name

LINEAR = ("mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", "cls")
"""Poolings of sentence-transformers that are a weighted sum of the tokens' states."""
PROBES = 4
"""Texts on which a quick way is compared with the plain one before it is believed."""


@dataclass(frozen=True)
class Depths:
    """Some texts at every depth.

    Attributes:
        rows: Which of the texts given, in the order of ``vectors``.
        vectors: Pooled vectors (texts, poolings, depths, dimension) in float32; the model's own pooling is the first.
        influence: (depths,), per block the sum over tokens of 1 − cosine(input, output).
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


class DepthEncoder:
    """Runs texts through a model once and reads every depth.

    Args:
        model: An opened model in evaluation mode.
        every_pooling: Read the other poolings of :data:`.POOLINGS` too, where the model's own is a
            weighted sum of its tokens.
        budget: Tokens in a batch, padding included.
        name: What the user calls the model, for errors.

    Attributes:
        poolings: Names of the poolings read, the model's own first.
        notes: What did not go the quick way, in sentences.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        every_pooling: bool = False,
        budget: int = BUDGET,
        name: str = "model",
    ) -> None:
        self._model = model
        self._name = name
        self._budget = budget
        self._transformer: PreTrainedModel = model[0].auto_model
        self.depth = len(blocks_of(self._transformer))
        self.notes: list[str] = []
        self._head = _head_of(model, every_pooling)
        self._one_pass: bool | None = None
        self._prefix: _Prefix | None = None
        self._shares = self._head is not None and is_causal(model[0])

    @property
    def poolings(self) -> tuple[str, ...]:
        """Names of the poolings read, the model's own first."""
        return self._head.names if self._head else (pooling_name(self._model),)

    @property
    def bytes_per_text(self) -> int:
        """Of the vectors that a text leaves."""
        return len(self.poolings) * self.depth * int(self._model.get_embedding_dimension()) * 4

    @torch.no_grad()
    def run(
        self, texts: Sequence[str], prompt: str = "", sampled: Collection[int] = (), seed: int = 0
    ) -> Iterator[Depths]:
        """Encode texts, the longest first.

        Args:
            texts: At least one.
            prompt: Goes before each.
            sampled: Indices of texts from which one token's states are kept.
            seed: Of which token.

        Yields:
            The texts of one batch at every depth.

        Raises:
            ModelError: Vectors are not finite, or a single text is too large for the memory.
            DataError: A text has no tokens, or its prompt leaves no room for them.
        """
        tokens = tokenize(self._model, texts, prompt)
        if prompt and pooling_name(self._model) == "l3prune":
            # The blank that ends the paper's prompt belongs to the word after it, where a tokenizer joins them.
            tokens.features["prompt_length"] = self._model.preprocess(["a"], prompt=prompt.rstrip())["prompt_length"]
        probe = None
        if self._one_pass is None:
            probe = self._check_one_pass(tokens, _spread(tokens, self._budget))
            self._one_pass = probe is not None
        prefix = self._share(tokens, probe)
        picks = {row: random.Random(f"{seed} {texts[row]}").random() for row in sampled}  # noqa: S311
        todo = deque(plan_evenly(tokens.lengths - (prefix.length if prefix else 0), self._budget))
        while todo:
            rows = todo.popleft()
            try:
                found = self._read(tokens, rows, prefix, picks)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                todo.extendleft(reversed(self._smaller(rows, tokens)))
                continue
            self._check_finite(found)
            yield replace(found, vectors=found.vectors[..., : self._model.truncate_dim])

    def _smaller(self, rows: list[int], tokens: Tokens) -> list[list[int]]:
        if len(rows) == 1:
            problem = f"a text of {int(tokens.lengths[rows[0]])} tokens does not fit into memory"
            raise ModelError(self._name, problem, "lower --max-length")
        self._budget = max(1, self._budget // 2)
        note = "a batch was too large for the memory and was halved"
        self.notes += [note] if note not in self.notes else []
        return list(halves(rows))

    def _check_finite(self, found: Depths) -> None:
        finite = found.vectors.isfinite().all(dim=3).all(dim=0)[0]
        if not bool(finite.all()):
            problem = f"gives vectors that are not finite at depth {int(finite.long().argmin()) + 1}"
            raise ModelError(self._name, problem, "its weights hold NaN, or overflow in this dtype")

    def _check_one_pass(self, tokens: Tokens, rows: list[int]) -> Depths | None:
        """A few texts read by hooks, if their last depth is what the model itself computes; fewer if need be."""
        try:
            found = self._one_pass_over(tokens, rows)
            return None if found is None else replace(found, rows=tuple(rows))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        return self._check_one_pass(tokens, self._smaller(rows, tokens)[0])

    def _one_pass_over(self, tokens: Tokens, rows: list[int]) -> Depths | None:
        features = self._to_device(tokens.batch(rows))
        found = self._believed(features)
        if found is None and self._head is not None:
            # The pooling may do more than a weighted sum; the model's own modules tell.
            head, self._head = self._head, None
            found = self._believed(features)
            if found is not None:
                self.notes.append(
                    f"other poolings than {head.names[0]} were not read: the model's own is more than one"
                )
        if found is None:
            self._shares = False
            self.notes.append("more than a norm follows the blocks of this model: each depth took a pass of its own")
        return found

    def _believed(self, features: dict[str, Any]) -> Depths | None:
        """What hooks read in the model's own pass, if their last depth is what comes out of it."""
        reader = _Reader(self._model, self._head, features, None, {})
        with _hooks(blocks_of(self._transformer), reader.visit):
            own = self._model(dict(features))["sentence_embedding"]
        found = reader.found(self.depth)
        return found if found is not None and self._agree(found.vectors[:, 0, -1], own) else None

    def _share(self, tokens: Tokens, probe: Depths | None) -> _Prefix | None:
        """What all texts start with, computed once, if that gives the vectors of the plain way.

        Args:
            tokens: Of the texts.
            probe: Some of them as the plain way gives them, where that is known already.
        """
        if not (self._shares and len(tokens.lengths) > 2 * PROBES):
            return None
        start = common_start(tokens)
        known = self._prefix
        if known is not None and torch.equal(start[: known.length], known.ids):
            return known
        if len(start) < SHORTEST_PREFIX:
            return None
        rows = list(probe.rows) if probe is not None else _spread(tokens, self._budget)
        try:
            plain = probe or self._hooked(self._to_device(tokens.batch(rows)), None, {})
            prefix = self._run_prefix(start)
            shared = self._hooked(self._to_device(tokens.batch(rows, left=False)), prefix, {})
        except (MemoryError, *REFUSALS) as error:
            if is_out_of_memory(error):
                return None  # no room to try it: the batches themselves are cut until they fit
            plain = shared = None
        if plain is not None and shared is not None and self._agree(shared.vectors, plain.vectors, exact=1e-4):
            self._prefix = prefix
            return prefix
        self._shares = False
        self.notes.append("the instruction was computed for each text anew: this model gives other vectors otherwise")
        return None

    def _run_prefix(self, start: Tensor) -> _Prefix:
        found = _Prefix(start)
        norm = final_norm(self._transformer)
        mask = torch.ones(1, len(start), device=self._model.device)

        def visit(index: int, before: Tensor, after: Tensor) -> None:
            found.normed.append(norm(after)[0].float())
            found.influence.append(float(block_influence(before, after, mask)))

        with _hooks(blocks_of(self._transformer), visit):
            found.cache = run_prefix(self._transformer, start)
        return found

    def _to_device(self, features: dict[str, Any]) -> dict[str, Any]:
        return {key: v.to(self._model.device) if isinstance(v, Tensor) else v for key, v in features.items()}

    def _read(self, tokens: Tokens, rows: list[int], prefix: _Prefix | None, picks: dict[int, float]) -> Depths:
        features = self._to_device(tokens.batch(rows, left=False if prefix else None))
        here = {place: picks[row] for place, row in enumerate(rows) if row in picks}
        found = self._hooked(features, prefix, here) if self._one_pass else self._pass_per_depth(features)
        assert found is not None, "the first batch went this way"
        return replace(found, rows=tuple(rows))

    def _hooked(self, features: dict[str, Any], prefix: _Prefix | None, picks: dict[int, float]) -> Depths | None:
        """One pass; None for an architecture whose blocks hand on something else than (texts, tokens, width)."""
        reader = _Reader(self._model, self._head, features, prefix, picks)
        with _hooks(blocks_of(self._transformer), reader.visit):
            if prefix is None or prefix.cache is None:
                self._model[0](dict(features))
            else:
                run_after(self._transformer, prefix.cache, prefix.length, features)
        return reader.found(self.depth)

    def _pass_per_depth(self, features: dict[str, Any]) -> Depths:
        """For the few architectures where more than a norm follows the blocks: one forward pass per depth."""
        mask = features["attention_mask"]
        vectors = []
        influence: dict[int, float] = {}

        def visit(index: int, before: Tensor, after: Tensor) -> None:
            real = mask
            # These blocks may keep several streams or another layout: every state counts the same.
            if before.shape[:-1] != mask.shape:
                real = torch.ones(before.shape[:-1], device=before.device) * (mask.sum() / before.shape[:-1].numel())
            influence[index] = float(block_influence(before, after, real))

        with _hooks(blocks_of(self._transformer), visit):
            for depth in range(1, self.depth + 1):
                with _first_blocks(self._transformer, depth):
                    vectors.append(self._model(dict(features))["sentence_embedding"].float())
        none = torch.zeros(0, self.depth, 1)
        sums = torch.tensor([influence[index] for index in range(self.depth)], dtype=torch.float64)
        pooled = torch.stack(vectors, dim=1)[:, None]
        return Depths((), pooled.cpu(), sums, int(mask.sum()), None, none, torch.zeros(0, dtype=torch.long))

    def _agree(self, found: Tensor, expected: Tensor, exact: float = 1e-3) -> bool:
        """Equal up to rounding; vectors that are not finite agree with anything: that is reported elsewhere."""
        found, expected = found.float().cpu(), expected.float().cpu()
        if found.shape != expected.shape:
            return False
        if not bool(expected.isfinite().all()):
            return True
        allowed = exact if self._transformer.dtype == torch.float32 else 3e-2
        error = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)
        return bool((error <= allowed).all())


@dataclass
class _Prefix:
    """What all texts start with: its keys and values, and per block its normed states and its Block Influence."""

    ids: Tensor
    cache: SharedPrefix | None = None
    normed: list[Tensor] = field(default_factory=list)
    influence: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Head:
    """What follows a transformer: poolings that are weighted sums, and modules that take the pooled vector."""

    names: tuple[str, ...]
    poolings: tuple[Pooling, ...]
    tail: tuple[nn.Module, ...]

    def weights(self, features: dict[str, Any]) -> Tensor:
        """The weight of each token's state in each pooled vector: (texts, poolings, tokens).

        A weighted sum's derivative by a state is its weight: so the arithmetic is the pooling modules' own.
        """
        mask = features["attention_mask"]
        found = []
        for pooling in self.poolings:
            with torch.enable_grad():
                states = torch.ones(*mask.shape, 1, device=mask.device, requires_grad=True)
                pooled = pooling(dict(features, token_embeddings=states))["sentence_embedding"]
                found.append(torch.autograd.grad(pooled.sum(), states)[0].squeeze(-1))
        return torch.stack(found, dim=1)

    def finish(self, pooled: Tensor, dtype: torch.dtype) -> Tensor:
        """Pooled vectors (texts, poolings, width) → (texts, poolings, dimension)."""
        current: dict[str, Any] = {"sentence_embedding": pooled.flatten(0, 1)}
        for module in self.tail:
            if next(module.parameters(), None) is not None:
                current["sentence_embedding"] = current["sentence_embedding"].to(dtype)
            current = module(current)
        vectors: Tensor = current["sentence_embedding"]
        return vectors.float().reshape(*pooled.shape[:2], -1)


def _head_of(model: SentenceTransformer, every_pooling: bool) -> _Head | None:
    """The model's head, or None where its pooling is no weighted sum and its modules must be run as they are."""
    modules = list(model)
    if len(modules) < 2 or not isinstance(modules[1], Pooling) or modules[1].pooling_mode not in LINEAR:
        return None
    own = pooling_name(model)
    others = [name for name in POOLINGS if name != own] if every_pooling else []
    width = modules[1].embedding_dimension
    poolings = (modules[1], *(make_pooling(name, width) for name in others))  # type: ignore[arg-type]
    return _Head((own, *others), poolings, tuple(modules[2:]))


class _Reader:
    """Takes each block's output as it passes."""

    def __init__(
        self,
        model: SentenceTransformer,
        head: _Head | None,
        features: dict[str, Any],
        prefix: _Prefix | None,
        picks: dict[int, float],
    ) -> None:
        self._model, self._head, self._features, self._prefix = model, head, features, prefix
        self._norm = final_norm(model[0].auto_model)
        whole = features["attention_mask"]
        skipped = prefix.length if prefix else 0
        self._mask = whole[:, skipped:]
        self._last = (self._mask * torch.arange(self._mask.shape[1], device=whole.device)).argmax(dim=1)
        if head is not None:
            weights = head.weights(features)
            if bool((weights[:, 0].sum(dim=1) == 0).any()):
                problem = f"of a text nothing is left to pool after {whole.shape[1]} tokens: its prompt fills them all"
                raise DataError("texts", problem, "shorten the instruction, or raise --max-length")
            self._weights, self._weights_before = weights[:, :, skipped:], weights[:, :, :skipped]
        self._picked = _positions(features, skipped, picks)
        self._vectors: dict[int, Tensor] = {}
        self._influence: dict[int, float] = {}
        self._ends: list[Tensor] = []
        self._states: list[Tensor] = []

    def visit(self, index: int, before: Tensor, after: Tensor) -> None:
        """Read the states before and after block ``index``, both (texts, tokens, width)."""
        if after.shape[:-1] != self._mask.shape or before.shape != after.shape:
            return
        normed = self._norm(after)
        self._vectors[index] = self._pool(index, normed)
        self._influence[index] = float(block_influence(before, after, self._mask))
        if index == 0:
            self._ends.append(self._at_end(before))
        self._ends.append(self._at_end(after))
        self._states.append(normed[self._picked[0], self._picked[1]])

    def _pool(self, index: int, normed: Tensor) -> Tensor:
        if self._head is None:
            return pool(self._model, normed, self._features).float()[:, None]
        pooled = self._weights @ normed.float()
        if self._prefix and bool(self._weights_before.any()):
            pooled = pooled + self._weights_before @ self._prefix.normed[index]
        return self._head.finish(pooled, normed.dtype)

    def _at_end(self, states: Tensor) -> Tensor:
        return states[torch.arange(len(states), device=states.device), self._last]

    def found(self, depth: int) -> Depths | None:
        """What was read; None if some block handed on something else."""
        if len(self._vectors) < depth:
            return None
        order = range(depth)
        influence = torch.tensor([self._influence[index] for index in order], dtype=torch.float64)
        texts = len(self._mask)
        if self._prefix:
            influence += texts * torch.tensor(self._prefix.influence, dtype=torch.float64)
        ends = torch.stack(self._ends, dim=1)
        rows, places = self._picked
        skipped = self._prefix.length if self._prefix else 0
        return Depths(
            rows=(),
            vectors=torch.stack([self._vectors[index] for index in order], dim=2).cpu(),
            influence=influence,
            tokens=int(self._features["attention_mask"].sum()),
            angles=(angular_distances(ends) * texts).double().cpu(),
            states=torch.stack(self._states, dim=1),
            targets=self._features["input_ids"][rows, places + skipped + 1],
        )


def _positions(features: dict[str, Any], skipped: int, picks: dict[int, float]) -> tuple[Tensor, Tensor]:
    """Rows and places (after the ``skipped`` first tokens) of sampled tokens that have a next one in their text."""
    mask = features["attention_mask"]
    start = int(torch.as_tensor(features.get("prompt_length", 0)).flatten()[0])
    found = []
    for row, share in picks.items():
        real = mask[row].nonzero().flatten()
        first, last = max(int(real[0]) + start, skipped), int(real[-1]) - 1
        if first <= last:
            found.append((row, first + int(share * (last - first + 1)) - skipped))
    table = torch.tensor(found, dtype=torch.long, device=mask.device).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _spread(tokens: Tokens, budget: int) -> list[int]:
    """A few texts from the shortest to the longest, as many as fit into a batch."""
    order = tokens.lengths.argsort().tolist()
    rows = [order[i * (len(order) - 1) // (PROBES - 1)] for i in range(PROBES)] if len(order) > PROBES else order
    while len(rows) > 1 and len(rows) * int(tokens.lengths[rows[-1]]) > budget:
        rows = rows[:-1:2]
    return rows


@contextmanager
def _first_blocks(transformer: PreTrainedModel, depth: int) -> Iterator[None]:
    """The model without its later blocks, for the time of a forward pass."""
    owner_path, _, name = find_stack(transformer).path.rpartition(".")
    owner = transformer.get_submodule(owner_path)
    every = getattr(owner, name)
    setattr(owner, name, every[:depth])
    try:
        yield
    finally:
        setattr(owner, name, every)


@contextmanager
def _hooks(blocks: nn.ModuleList, visit: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Within: ``visit(index, before, after)`` is called with the states around each block that runs."""

    def hook(index: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        visit(index, args[0] if args else kwargs["hidden_states"], states_of(output))

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(partial(hook, index), with_kwargs=True).remove)
        yield
