"""One pass over the data: what every depth of a model is worth to text encoding.

Each distinct text is run once (:mod:`.depths`); batches are then put together from the pooled vectors. Only
vectors that a later batch needs are kept: memory grows with the size of a group of batches, not with the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from secateur.choosing.choose import choose
from secateur.choosing.selectors import lowest_in_each_half, replicates_of
from secateur.data.sources import Texts, read_sources
from secateur.errors import ConfigError
from secateur.files import results_folder
from secateur.measures import metrics
from secateur.measures.costs import Size, layer_sizes, measure_layers
from secateur.measures.intervals import MINIMUM_UNITS, has_converged, interval, looks
from secateur.models import model_label, model_source
from secateur.models.compat import multiplies_bfloat16
from secateur.models.forward import pooling_name
from secateur.models.open_model import open_model
from secateur.options import PROFILE_FILES, ProfileOptions, step
from secateur.profiling.corpus import Batch, Corpus, check_sources, make_corpus, with_prompts
from secateur.profiling.depths import DepthEncoder
from secateur.profiling.lens import next_token_losses
from secateur.progress import Progress, silent
from secateur.provenance import provenance
from secateur.results import DepthRow, LayerCost, Profile
from secateur.runtime.core import is_out_of_memory

if TYPE_CHECKING:
    from secateur.evaluation.tasks import Task

SAMPLE = 1024
"""Vectors per depth that the label-free metrics are computed from, so that memory does not grow with the data."""
PICTURES = tuple(name for name in PROFILE_FILES if not name.endswith(".json"))
HELD_BYTES = 192 << 20
"""Size of the pooled vectors of one group of batches, whose texts are sorted by length together."""

_OPENING = {"pooling", "max_length", "dtype", "device", "trust_remote_code"}
"""Options that say how a model is opened."""

Column = Sequence[float | None]


@step(ProfileOptions)
def profile(options: ProfileOptions, *, progress: Progress = silent) -> Profile:
    """Measure every depth of a model in one pass over (anchor, positive, negative) data, or over texts alone.

    Texts alone give all but the supervised columns. Where there is no instruction at all, the model's default prompt
    goes before every text, as in use.

    Returns:
        The profile, one row per depth.

    Raises:
        ModelError, DataError, ConfigError, OutputError: Bad input; or a model whose vectors are not finite.
    """
    out = None if options.out is None else results_folder(options.out, *PROFILE_FILES)
    seed = options.seed
    sources = read_sources(options.data, options.instruction, options.columns, most=options.max_examples, seed=seed)
    check_sources(sources, options.max_examples)
    if options.early_stopping and all(isinstance(source, Texts) for source in sources):
        raise ConfigError("early_stopping", True, "needs losses, and the data are texts alone", "leave it out")
    tasks: list[Task] = []
    if options.tasks:
        from secateur.evaluation.tasks import open_tasks  # with mteb, which takes a while to import

        tasks = open_tasks(options.tasks, options.sample, seed)
    model, name, sizes, notes = _open(options)
    sources = [with_prompts(source, model, options.instruction is None) for source in sources]
    corpus = make_corpus(sources, options.batch_size, seed)
    encoder = DepthEncoder(model, name=name)
    measured = _Pass(encoder, corpus, options)
    measured.run(progress)
    rows = _rows(model, measured, seed, notes)
    result = Profile(
        provenance=provenance([*(source.source for source in sources), *(task.source for task in tasks)], seed),
        model=name,
        depth=encoder.depth,
        pooling=pooling_name(model),
        scale=options.scale,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        batch_size=max(len(batch.anchors) for batch in corpus.batches),
        batches=measured.batches,
        max_length=model.max_seq_length,
        prompt=sources[0].prompt,
        depths=rows,
        texts=measured.texts,
        tokens=measured.tokens,
        converged=measured.converged,
        cka=_table(metrics.linear_cka(measured.sample_vectors)),
        angular=() if measured.angles is None else _table(measured.angles / measured.texts),
        batch_losses=_table(measured.losses) if measured.batch_losses else (),
        layer_costs=layer_costs(model, sizes, notes),
        notes=tuple(dict.fromkeys([*notes, *encoder.notes, *_batch_notes(measured)])),
        source="" if isinstance(options.model, SentenceTransformer) else model_source(options.model),
    )
    if out is not None:
        result.save(out)  # what is measured stays, whatever becomes of the tasks
    if tasks:
        result = _with_scores(result, encoder, tasks, options, progress)
    if out is not None:
        result.save(out)
        _draw(result, out)
    return result


def _with_scores(
    result: Profile, encoder: DepthEncoder, tasks: Sequence[Task], options: ProfileOptions, progress: Progress
) -> Profile:
    """A profile with the scores of all depths on tasks."""
    from secateur.profiling.depth_scores import notes_on, score_depths

    todo = [(task, range(1, encoder.depth + 1)) for task in tasks]
    scores = tuple(score_depths(encoder, todo, sample=options.sample, seed=options.seed, progress=progress))
    notes = tuple(dict.fromkeys([*result.notes, *encoder.notes, *notes_on(scores)]))
    return replace(result, task_scores=tuple(score.row for score in scores if score.row), notes=notes)


def _batch_notes(measured: _Pass) -> list[str]:
    """That batches were left out, or have unequal numbers of pairs."""
    notes, batches = [], measured.corpus.batches
    if measured.batches < len(batches):
        notes.append(f"early stopping after {measured.batches} of {len(batches)} batches")
    pairs = sorted({len(batch.anchors) for batch in batches if batch.positives})
    if len(pairs) > 1:
        sizes = " and ".join(map(str, pairs))
        notes.append(f"losses of batches of {sizes} pairs were averaged: more pairs give a higher loss")
    return notes


def _open(options: ProfileOptions) -> tuple[SentenceTransformer, str, tuple[Size, ...], list[str]]:
    """The model in the dtype that is used, its name, the sizes of its layers as they are stored, and notes."""
    given, notes = options.model, list[str]()
    if isinstance(given, SentenceTransformer):
        for option in options.model_fields_set & _OPENING:
            raise ConfigError(option, getattr(options, option), "is for a model that is opened here", "leave it out")
        return given.eval(), "model", layer_sizes(given), notes  # without dropout, as encode
    model = open_model(
        given,
        pooling=options.pooling,
        max_length=options.max_length,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    sizes = layer_sizes(model)
    if options.dtype == "auto" and model.device.type == "cpu":
        dtype = auto_dtype()
        for tensor in model.state_dict(keep_vars=True).values():  # what is computed, such as angles, stays exact
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
        name = str(dtype).removeprefix("torch.")
        has = "multiplies bfloat16" if dtype is torch.bfloat16 else "does not say that it multiplies bfloat16"
        notes.append(f"dtype {name}: this processor {has}; a dtype that is named is the same on any machine")
    return model, model_label(given), sizes, notes


def auto_dtype() -> torch.dtype:
    """The dtype for a model on the CPU: bfloat16 where the processor multiplies it in hardware, else float32.

    What the processor can do is asked, and no clock: a busy machine would turn a timing, and with it the losses.
    """
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


class _Pass:
    """One pass over the batches, and what it has measured."""

    def __init__(self, encoder: DepthEncoder, corpus: Corpus, options: ProfileOptions) -> None:
        self._encoder, self.corpus, self._options = encoder, corpus, options
        self._vectors: dict[int, Tensor] = {}  # (depths, dimension) of texts that a batch still needs
        self.batches = self.texts = self.tokens = 0
        self.converged: bool | None = None
        self.batch_losses: list[Tensor] = []  # (depths,)
        self.batch_scores: list[Tensor] = []  # (3, depths): accuracy, nDCG@10 and alignment
        self.influence = torch.zeros(())
        self.angles: Tensor | None = torch.zeros(())
        self.sample: dict[int, Tensor] = {}

    @property
    def losses(self) -> Tensor:
        """(batches, depths)."""
        return torch.stack(self.batch_losses)

    @property
    def sample_vectors(self) -> Tensor:
        """(depths, texts, dimension), of the sampled texts."""
        return torch.stack(list(self.sample.values()), dim=1)

    def run(self, progress: Progress) -> None:
        """Read the batches; with early stopping, convergence is tested at looks that are fixed now."""
        batches, early = self.corpus.batches, self._options.early_stopping
        last_use = {text: number for number, batch in enumerate(batches) for text in batch.texts}
        tests = looks(sum(bool(batch.positives) for batch in batches)) if early else ()
        # The more texts are encoded together, the more alike are the lengths in a forward pass.
        bytes_per_batch = max(len(batch.texts) for batch in batches) * self._encoder.bytes_per_text
        size = 1 if early else max(1, HELD_BYTES // bytes_per_batch)
        progress("profile", 0, len(batches))
        for start in range(0, len(batches), size):
            group = batches[start : start + size]
            self._encode(sorted(set().union(*(batch.texts for batch in group)) - self._vectors.keys()))
            for batch in group:
                self._score(batch)
                progress("profile", self.batches, len(batches))
            # A copy frees the batch that a vector came with.
            self._vectors = {k: own.clone() for k, own in self._vectors.items() if last_use[k] >= self.batches}
            if len(self.batch_losses) in tests and has_converged(self.losses, len(tests)):
                break
        self.converged = has_converged(self.losses, len(tests) or 1) if self.batch_losses else None

    def _encode(self, members: list[int]) -> None:
        """Run texts and keep their vectors."""
        corpus = self.corpus.texts
        for prompt in sorted({corpus[text][0] for text in members}):
            own = [text for text in members if corpus[text][0] == prompt]
            for found in self._encoder.run([corpus[text][1] for text in own], prompt):
                self._vectors |= {own[row]: vectors for row, vectors in zip(found.rows, found.vectors, strict=True)}
                self.texts += len(found.rows)
                self.tokens += found.tokens
                self.influence = self.influence + found.influence
                self.angles = None if self.angles is None or found.angles is None else self.angles + found.angles

    def _score(self, batch: Batch) -> None:
        """Measure one batch at all depths at once. The paper's pooling leaves false negatives in, as its code does."""
        self.batches += 1
        for text in (*batch.anchors, *batch.positives):
            if len(self.sample) < SAMPLE and text not in self.sample:
                self.sample[text] = self._vectors[text].clone()
        if not batch.positives:
            return
        columns = (batch.anchors, batch.positives, batch.negatives)
        numbers = metrics.text_numbers(*([self.corpus.texts[text][1] for text in column] for column in columns))
        # (depths, texts, dimension)
        anchors, positives = (torch.stack([self._vectors[t] for t in of], dim=1) for of in columns[:2])
        negatives = [self._vectors[text][:, None] for text in batch.negatives]
        found = metrics.cosines(anchors, torch.cat([positives, *negatives], dim=1))
        masked = self._encoder.pooling != "l3prune"
        mask = metrics.false_negative_mask(*numbers) if masked else torch.tensor(False)
        self.batch_losses.append(metrics.contrastive_loss(found.masked_fill(mask, -torch.inf), self._options.scale))
        unranked = metrics.false_negative_mask(*numbers, once=True)
        accuracy, ndcg = metrics.retrieval(found.masked_fill(unranked, -torch.inf))
        self.batch_scores.append(torch.stack([accuracy, ndcg, metrics.alignment(anchors, positives)]))


def _rows(model: SentenceTransformer, measured: _Pass, seed: int, notes: list[str]) -> tuple[DepthRow, ...]:
    """The columns of the profile; those that need pairs, or a language-model head, where there are any."""
    vectors = measured.sample_vectors
    columns: dict[str, Column] = {
        "block_influence": (measured.influence / measured.tokens).tolist(),
        "effective_rank": [_number(metrics.effective_rank(here)) for here in vectors],
        "uniformity": [metrics.uniformity(here) for here in vectors],
        "mean_cosine": [metrics.mean_cosine(here) for here in vectors],
    }
    if measured.batch_losses:
        columns |= _supervised(measured, seed, notes)
    else:
        notes.append("texts alone: no loss, accuracy, nDCG@10 and alignment")
        columns |= dict.fromkeys(("loss", "loss_se"), [None] * len(vectors))
    flat = ", ".join(str(depth) for depth, rank in enumerate(columns["effective_rank"], start=1) if rank is None)
    notes += [f"all vectors are the same at depth {flat}: no effective rank and no CKA there"] if flat else []
    if (losses := next_token_losses(model, measured.corpus.texts, seed)) is not None:
        columns["next_token_loss"] = [_number(loss) for loss in losses]
        lost = ", ".join(str(depth) for depth, loss in enumerate(losses, start=1) if not math.isfinite(loss))
        why = "the language-model head holds NaN, or overflows in this dtype"
        notes += [f"the next-token loss is no number at depth {lost}: {why}"] if lost else []
    by_depth = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return tuple(DepthRow(depth=depth, **row) for depth, row in enumerate(by_depth, start=1))


def _supervised(measured: _Pass, seed: int, notes: list[str]) -> dict[str, Column]:
    """The columns that need pairs."""
    losses = measured.losses.double()
    batches, depths = losses.shape
    scores = torch.stack(measured.batch_scores).mean(dim=0).tolist()
    columns: dict[str, Column] = {
        "loss": losses.mean(dim=0).tolist(),
        "loss_se": (losses.std(dim=0) / math.sqrt(batches)).tolist() if batches > 1 else [None] * depths,
        **dict(zip(("accuracy", "ndcg_at_10", "alignment"), scores, strict=True)),
    }
    if batches < MINIMUM_UNITS:
        few = "one batch is" if batches == 1 else f"{batches} batches are"
        notes.append(f"{few} too few for intervals and selection probabilities: it takes {MINIMUM_UNITS}")
        return columns
    replicates = replicates_of(losses, seed)
    low, high = zip(*map(interval, replicates.T), strict=True)
    chosen = lowest_in_each_half(replicates)
    chance = [float((chosen == depth).any(axis=-1).mean()) for depth in range(1, depths + 1)]
    return columns | {"loss_low": low, "loss_high": high, "selection_probability": chance}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _table(matrix: Tensor) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(_number(value) for value in row) for row in matrix.double().tolist())


def layer_costs(model: SentenceTransformer, sizes: Sequence[Size], notes: list[str]) -> tuple[LayerCost, ...]:
    """What the layers cost; whatever goes wrong here costs no more than these numbers."""
    try:
        return measure_layers(model, sizes)
    except Exception as error:
        what = "the batch that times them does not fit into memory" if is_out_of_memory(error) else str(error)
        notes.append(f"no costs of cut models: {what or type(error).__name__}")
        return ()


def _draw(result: Profile, out: Path) -> None:
    """The pictures of a profile; those of an earlier one that it does not have are removed."""
    from secateur.figures import profile_figures, save

    drawn = profile_figures(result, choose(result) if result.can_choose else None)
    for name in PICTURES:
        if name.partition(".")[0] not in drawn:
            (out / name).unlink(missing_ok=True)
    for name, figure in reversed(drawn.items()):  # the curve is the last file of a profile: with it, all is there
        for kind in ("svg", "png"):
            save(figure, out / f"{name}.{kind}")
