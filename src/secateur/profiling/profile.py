"""One pass over the data: what every depth of a model is worth to text encoding.

Each distinct text is run once (:mod:`.depths`); batches are then put together from the pooled vectors. Only
vectors that a later batch needs are kept: memory grows with the size of a group of batches, not with the data.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from secateur.data.pairs import Pair, Pairs, batches, l3prune_prompt
from secateur.data.sources import Data, Source, read_sources
from secateur.data.texts import Texts
from secateur.errors import ConfigError, DataError, SecateurError
from secateur.files import results_folder
from secateur.measures import stopping
from secateur.measures.curves import chances, draws_of, lowest_in_each_half
from secateur.measures.false_negatives import false_negative_mask, text_numbers
from secateur.measures.intervals import FEWEST, interval
from secateur.measures.metrics import (
    alignment,
    cosines,
    effective_rank,
    linear_cka,
    loss_of_cosines,
    mean_cosine,
    retrieval,
    uniformity,
)
from secateur.models import model_label
from secateur.models.forward import is_out_of_memory
from secateur.models.open_model import open_model
from secateur.models.pooling import pooling_name
from secateur.options import PROFILE_FILES, PoolingName, ProfileOptions, check
from secateur.profiling.depths import DepthEncoder, Depths
from secateur.profiling.lens import find_lens, positions
from secateur.profiling.parts import Size, measure_parts, part_sizes
from secateur.progress import Progress, silent
from secateur.provenance import provenance
from secateur.results import DepthRow, DepthScoreRow, PartRow, Profile

if TYPE_CHECKING:
    from secateur.evaluation.tasks import Task

SAMPLE = 1024
"""Vectors per depth that the label-free metrics are computed from, so that memory does not grow with the data."""
PICTURES = tuple(name for name in PROFILE_FILES if not name.endswith(".json"))
BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""Instructions that multiply bfloat16, by torch's names for them."""
HELD_BYTES = 192 << 20
"""Of the pooled vectors of one group of batches, which are sorted by length together."""


def profile(
    model: str | Path | SentenceTransformer,
    data: Data,
    *,
    columns: Mapping[str, str] | None = None,
    scale: float = 20.0,
    instruction: str | None = None,
    pooling: PoolingName | None = None,
    batch_size: int = 64,
    max_examples: int = 1280,
    until_sure: bool = False,
    max_length: int = 512,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 42,
    tasks: Sequence[str | Path] = (),
    sample: int | None = None,
    trust_remote_code: bool = False,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> Profile:
    """Measure every depth of a model in one pass over (anchor, positive, negative) data, or over texts alone.

    Args:
        model: Anything :func:`.open_model` opens, or an opened model.
        data: Files of pairs (see :mod:`.pairs`; each batch comes from one of them) or of texts (see
            :mod:`.texts`), from which all but the supervised columns can be told; folders of them; or data sets by
            name (see :mod:`.hub_sets`).
        columns: Role → column, where the data call their ``query``, ``positive``, ``negative`` or ``text`` otherwise.
        scale: Inverse temperature of the contrastive loss.
        instruction: Goes before each anchor, in place of those that come with the data; before each text alone. Where
            there is none at all, the model's default prompt goes before every text, as in use.
        pooling: For a bare language model; ``l3prune`` is the paper's own, with its form of an instruction.
        batch_size: Pairs per batch; the loss depends on it.
        max_examples: Rows used, shared evenly by the files and drawn by ``seed``; batches keep the order of the file
            within, and are visited in an order drawn by ``seed``.
        until_sure: Stop before ``max_examples`` when the choice of L3Prune's rule is settled at 95 %, by a test
            at looks that are fixed before (:mod:`.stopping`).
        max_length: Tokens per text, for a bare language model.
        dtype: As for ``open_model``; ``auto`` takes, on the CPU, what :func:`auto_dtype` says. An opened model stays as
            it is. The profile's ``dtype`` is what was taken: given here, it is taken on any machine.
        device: Torch device.
        seed: Of the drawing.
        tasks: Task folders, or names of mteb's tasks and benchmarks: their zero-shot scores at every depth, from one
            encoding of their texts, are those of ``evaluate`` on the model cut there (:mod:`.depth_scores`).
        sample: As for ``evaluate``: at most so many rows of each task.
        trust_remote_code: As for ``open_model``.
        out: A folder for ``profile.json`` and its pictures.
        progress: Told after each batch.

    Returns:
        The profile, one row per depth.

    Raises:
        ModelError, DataError, ConfigError, OutputError: Bad input; or a model whose vectors are not finite.
    """
    check(ProfileOptions, scale=scale, pooling=pooling, batch_size=batch_size, max_examples=max_examples)
    check(ProfileOptions, max_length=max_length, dtype=dtype, seed=seed, sample=sample)
    if out is not None:
        out = results_folder(out, *PROFILE_FILES)
    sources = read_sources(data, instruction, columns, most=max_examples, seed=seed)
    _check_sources(sources, max_examples)
    if until_sure and not any(isinstance(source, Pairs) for source in sources):
        raise ConfigError("until_sure", until_sure, "needs losses, and the data are texts alone", "leave it out")
    opened = _open_tasks(tasks, sample, seed)
    name = model_label(model) if isinstance(model, (str, Path)) else "model"
    notes: list[str] = []
    as_given = isinstance(model, SentenceTransformer)
    if not isinstance(model, SentenceTransformer):
        options = {"device": device, "trust_remote_code": trust_remote_code}
        model = open_model(model, pooling=pooling, max_length=max_length, dtype=dtype, **options)  # type: ignore[arg-type]
    sizes = part_sizes(model)  # as stored
    notes += _quicken(model) if dtype == "auto" and not as_given else []
    if instruction is None:
        sources = [_as_used(source, model) for source in sources]
    if pooling_name(model) == "l3prune":
        sources = [_in_papers_format(source) for source in sources]
    corpus = _corpus(sources, batch_size, seed)
    encoder = DepthEncoder(model, every_pooling=True, name=name)
    sums = _measure(encoder, corpus, scale, seed, until_sure, progress)
    notes += _stopped(sums, corpus)
    rows = _rows(model, sums, seed, notes)
    failed: SecateurError | None = None
    task_scores: tuple[DepthScoreRow, ...] = ()
    try:
        task_scores = _score_tasks(model, opened, sample, seed, name, progress, notes)
    except SecateurError as error:  # what is measured so far is kept
        failed = error
        notes.append(f"no task scores: {error}")
    parts = _parts(model, sizes, notes)
    result = Profile(
        provenance=provenance([*(source.source for source in sources), *(task.source for task in opened)], seed),
        model=name,
        depth=encoder.depth,
        pooling=pooling_name(model),
        scale=scale,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        batch_size=max(len(batch.anchors) for batch in corpus.batches),
        batches=sums.batches,
        max_length=model.max_seq_length,
        prompt=sources[0].prompt,
        depths=rows,
        texts=sums.texts,
        tokens=sums.tokens,
        settled=sums.settled,
        cka=_table(linear_cka(sums.vectors)),
        angular=() if sums.angles is None else _table(sums.angles / sums.texts),
        losses_by_pooling=sums.losses_by_pooling(encoder.poolings),
        batch_losses=_table(sums.losses) if sums.batch_losses else (),
        task_scores=task_scores,
        parts=parts,
        notes=tuple(dict.fromkeys([*notes, *encoder.notes, *corpus.notes])),
    )
    if out is not None:
        result.save(out)
    if failed is not None:
        raise failed
    if out is not None:
        _draw(result, out)
    return result


def _parts(model: SentenceTransformer, sizes: Sequence[Size], notes: list[str]) -> tuple[PartRow, ...]:
    """What the parts cost; whatever goes wrong here costs no more than these numbers, not the measured profile."""
    try:
        return measure_parts(model, sizes)
    except Exception as error:
        what = "the batch that times them does not fit into memory" if is_out_of_memory(error) else str(error)
        notes.append(f"no costs of cut models: {what or type(error).__name__}")
    return ()


def _draw(result: Profile, out: Path) -> None:
    """The pictures of a profile; those of an earlier one that it does not have are removed."""
    from secateur.figures.depth import profile_figures
    from secateur.figures.saving import save_png, save_svg

    choice: dict[str, int] = {}
    if result.can_choose:
        losses = torch.tensor([row.loss for row in result.depths], dtype=torch.float64)
        choice = dict(zip(("small", "large"), lowest_in_each_half(losses).tolist(), strict=True))
    drawn = profile_figures(result, choice)
    for name in PICTURES:
        if name.partition(".")[0] not in drawn:
            (out / name).unlink(missing_ok=True)
    for name, figure in reversed(drawn.items()):  # the curve is the last file of a profile: with it, all is there
        save_svg(figure, out / f"{name}.svg")
        save_png(figure, out / f"{name}.png")


def _open_tasks(tasks: Sequence[str | Path], sample: int | None, seed: int) -> list[Task]:
    if not tasks:
        if sample is not None:
            raise ConfigError("sample", sample, "is a number of rows of each task, and there are none", "give tasks")
        return []
    from secateur.evaluation.evaluate import open_tasks  # with mteb, which takes a while to import

    return open_tasks(tasks, sample, seed)


def _score_tasks(
    model: SentenceTransformer,
    tasks: list[Task],
    sample: int | None,
    seed: int,
    name: str,
    progress: Progress,
    notes: list[str],
) -> tuple[DepthScoreRow, ...]:
    if not tasks:
        return ()
    from secateur.profiling.depth_scores import depth_scores

    found = depth_scores(model, tasks, sample=sample, seed=seed, name=name, progress=progress)
    notes += found.notes
    return found.rows


def auto_dtype() -> torch.dtype:
    """The number format for a model on the CPU: bfloat16 where the processor multiplies it in hardware, else float32.

    What the processor can do is asked, and no clock: a busy machine would turn a timing, and with it the losses.
    """
    can: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch cannot tell
    return torch.bfloat16 if any(can.get(name) for name in BFLOAT16) else torch.float32


def _quicken(model: SentenceTransformer) -> list[str]:
    """Put a model on the CPU into the number format of :func:`auto_dtype`, and say so."""
    if model.device.type != "cpu":
        return []
    dtype = auto_dtype()
    stored = model.state_dict(keep_vars=True).values()
    for tensor in (tensor for tensor in stored if isinstance(tensor, Tensor) and tensor.is_floating_point()):
        tensor.data = tensor.data.to(dtype)  # as when it is loaded so: what is computed, such as angles, stays exact
    name = str(dtype).removeprefix("torch.")
    has = "multiplies bfloat16" if dtype is torch.bfloat16 else "does not say that it multiplies bfloat16"
    return [f"number format {name}: this processor {has}; --dtype {name} takes it on any machine"]


def _check_sources(sources: Sequence[Source], max_examples: int) -> None:
    if not sources:
        raise ConfigError("data", sources, "no data file given")
    contents = [source.source.sha256 for source in sources]
    share = max(2, max_examples // len(sources))
    for source in sources:
        if contents.count(source.source.sha256) > 1:
            raise DataError(source.source.name, "is there twice: its batches would count twice", "name it once")
        if len(source.rows) < share:
            _check_differ(source, "holds fewer than two different {}", "a loss needs something to tell apart")
        _check_differ(source, f"fewer than two different {{}} were drawn from it, of {share}", "raise --max-examples")


def _check_differ(source: Pairs | Texts, problem: str, hint: str) -> None:
    if len({(row.anchor, row.positive) if isinstance(row, Pair) else row for row in source.rows}) < 2:
        what = "pairs" if isinstance(source, Pairs) else "texts"
        raise DataError(source.source.name, problem.format(what), hint)
    if isinstance(source, Pairs) and not _tells_apart(source):
        raise DataError(source.source.name, "every passage is a positive of every anchor", hint)


def _tells_apart(pairs: Pairs) -> bool:
    """Whether some anchor has a negative at all, wherever in the data it stands."""
    relevant: dict[str, set[str]] = {}
    for row in pairs.rows:
        relevant.setdefault(row.anchor, {row.anchor}).add(row.positive)
    passages = {text for row in pairs.rows for text in (row.positive, *row.negatives)}
    return any(not passages <= own for own in relevant.values())


def _as_used(source: Source, model: SentenceTransformer) -> Source:
    """Data that bring no instruction, with what the model's ``encode`` puts before every text."""
    own = model.prompts.get(model.default_prompt_name or "") or ""
    if isinstance(source, Texts):
        return source if source.prompt else replace(source, prompt=own)
    return source if source.prompt or source.passage_prompt else replace(source, prompt=own, passage_prompt=own)


def _in_papers_format(source: Source) -> Source:
    if isinstance(source, Texts):
        return replace(source, prompt=l3prune_prompt(source.prompt))
    return replace(source, prompt=l3prune_prompt(source.prompt), passage_prompt=l3prune_prompt(source.passage_prompt))


@dataclass(frozen=True)
class _Batch:
    """Indices of distinct texts; a batch of texts alone has anchors only."""

    anchors: tuple[int, ...]
    positives: tuple[int, ...] = ()
    negatives: tuple[int, ...] = ()

    @property
    def texts(self) -> set[int]:
        return {*self.anchors, *self.positives, *self.negatives}


@dataclass(frozen=True)
class _Corpus:
    """The distinct texts, each with its prompt, and the batches in the order in which they are visited."""

    texts: tuple[tuple[str, str], ...]
    batches: tuple[_Batch, ...]
    notes: tuple[str, ...]


def _corpus(sources: Sequence[Pairs | Texts], size: int, seed: int) -> _Corpus:
    places: dict[tuple[str, str], int] = {}

    def indices(prompt: str, texts: Iterable[str]) -> tuple[int, ...]:
        return tuple(places.setdefault((prompt, text), len(places)) for text in texts)

    found = []
    for source in sources:
        if isinstance(source, Texts):
            starts = range(0, len(source.rows), size)
            found += [_Batch(indices(source.prompt, source.rows[start : start + size])) for start in starts]
            continue
        for batch in batches(source, size):
            others = (indices(batch.passage_prompt, texts) for texts in (batch.positives, batch.negatives))
            found.append(_Batch(indices(batch.prompt, batch.anchors), *others))
    # In a drawn order the first batches stand for all of them, whatever the order of the files.
    random.Random(seed).shuffle(found)  # noqa: S311 - not for secrets
    sizes = sorted({len(batch.anchors) for batch in found if batch.positives})
    note = f"losses of batches of {' and '.join(map(str, sizes))} pairs were averaged: their chance levels differ"
    return _Corpus(tuple(places), tuple(found), (note,) if len(sizes) > 1 else ())


@dataclass
class _Sums:
    """What the pass has told so far; per batch (poolings, depths), the model's own pooling first."""

    batches: int = 0
    settled: bool | None = None
    texts: int = 0
    tokens: int = 0
    batch_losses: list[Tensor] = field(default_factory=list)
    accuracy: list[Tensor] = field(default_factory=list)
    ndcg: list[Tensor] = field(default_factory=list)
    alignment: list[Tensor] = field(default_factory=list)
    influence: Tensor = field(default_factory=lambda: torch.zeros(()))
    angles: Tensor | None = field(default_factory=lambda: torch.zeros(()))
    sample: dict[int, Tensor] = field(default_factory=dict)
    states: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    @property
    def losses(self) -> Tensor:
        """(batches, depths), by the model's own pooling."""
        return torch.stack(self.batch_losses)[:, 0]

    @property
    def vectors(self) -> Tensor:
        """(depths, texts, dimension), of the sampled texts by the model's own pooling."""
        return torch.stack(list(self.sample.values()), dim=1)

    def losses_by_pooling(self, names: Sequence[str]) -> dict[str, tuple[float, ...]]:
        if not self.batch_losses:
            return {}
        means = torch.stack(self.batch_losses).double().mean(dim=0)
        return {name: tuple(losses.tolist()) for name, losses in zip(names, means, strict=True)}


def _measure(
    encoder: DepthEncoder, corpus: _Corpus, scale: float, seed: int, until_sure: bool, progress: Progress
) -> _Sums:
    """Read the batches; with ``until_sure`` the choice is tested at looks that are fixed now."""
    sums = _Sums()
    held: dict[int, Tensor] = {}
    last_use = {text: number for number, batch in enumerate(corpus.batches) for text in batch.texts}
    looks = stopping.looks(sum(bool(batch.positives) for batch in corpus.batches)) if until_sure else ()
    progress("profile", 0, len(corpus.batches))
    for group in _groups(corpus, encoder, one_by_one=until_sure):
        members = sorted(set().union(*(batch.texts for batch in group)) - held.keys())
        _encode(encoder, corpus, members, held, sums, seed)
        for batch in group:
            _score(batch, corpus, held, scale, sums, masked=encoder.poolings[0] != "l3prune")
            progress("profile", sums.batches, len(corpus.batches))
        # A copy frees the batch that a vector came with.
        held = {text: vectors.clone() for text, vectors in held.items() if last_use[text] >= sums.batches}
        if len(sums.batch_losses) in looks and stopping.is_settled(sums.losses, len(looks)):
            break
    sums.settled = stopping.is_settled(sums.losses, len(looks) or 1) if sums.batch_losses else None
    return sums


def _groups(corpus: _Corpus, encoder: DepthEncoder, one_by_one: bool) -> Iterator[tuple[_Batch, ...]]:
    """Batches whose texts are encoded together: the more, the more alike are the lengths in a forward pass."""
    largest = max(len(batch.texts) for batch in corpus.batches)
    size = 1 if one_by_one else max(1, HELD_BYTES // (largest * encoder.bytes_per_text))
    batches = iter(corpus.batches)
    while group := tuple(itertools.islice(batches, size)):
        yield group


def _encode(
    encoder: DepthEncoder, corpus: _Corpus, members: list[int], held: dict[int, Tensor], sums: _Sums, seed: int
) -> None:
    """Run texts and keep their vectors (poolings, depths, dimension)."""
    missing = max(0, positions(sums.texts + len(members)) - sum(map(len, sums.targets)))
    sampled = set(random.Random(seed).sample(members, min(missing, len(members))))  # noqa: S311 - not for secrets
    for prompt in sorted({corpus.texts[text][0] for text in members}):
        own = [text for text in members if corpus.texts[text][0] == prompt]
        picks = [place for place, text in enumerate(own) if text in sampled]
        for found in encoder.run([corpus.texts[text][1] for text in own], prompt, picks, seed):
            for row, vectors in zip(found.rows, found.vectors, strict=True):
                held[own[row]] = vectors
            _add(found, sums)


def _add(found: Depths, sums: _Sums) -> None:
    sums.texts += len(found.rows)
    sums.tokens += found.tokens
    sums.influence = sums.influence + found.influence
    sums.angles = None if sums.angles is None or found.angles is None else sums.angles + found.angles
    if len(found.targets):
        sums.states.append(found.states)
        sums.targets.append(found.targets)


def _score(batch: _Batch, corpus: _Corpus, held: dict[int, Tensor], scale: float, sums: _Sums, *, masked: bool) -> None:
    """What one batch tells, at all depths at once; ``masked`` leaves false negatives out, which the paper does not."""
    sums.batches += 1
    for text in (*batch.anchors, *batch.positives):
        if len(sums.sample) < SAMPLE and text not in sums.sample:
            sums.sample[text] = held[text][0].clone()
    if not batch.positives:
        return
    columns = (batch.anchors, batch.positives, batch.negatives)
    anchor, positive, negative = text_numbers(*([corpus.texts[text][1] for text in column] for column in columns))
    never = false_negative_mask(anchor, positive, negative) if masked else torch.tensor(False)
    unranked = false_negative_mask(anchor, positive, negative, once=True)
    losses = []
    for pooling in range(len(held[batch.anchors[0]])):
        anchors = torch.stack([held[text][pooling] for text in batch.anchors], dim=1)
        others = torch.stack([held[text][pooling] for text in (*batch.positives, *batch.negatives)], dim=1)
        found = cosines(anchors, others)
        losses.append(loss_of_cosines(found.masked_fill(never, -torch.inf), scale))
        if pooling == 0:
            accuracy, ndcg = retrieval(found.masked_fill(unranked, -torch.inf))
            sums.accuracy.append(accuracy)
            sums.ndcg.append(ndcg)
            sums.alignment.append(alignment(anchors, others[:, : len(batch.positives)]))
    sums.batch_losses.append(torch.stack(losses))


def _stopped(sums: _Sums, corpus: _Corpus) -> list[str]:
    """Says that a profile ended early."""
    total = len(corpus.batches)
    return [f"the choice was settled after {sums.batches} of {total} batches"] if sums.batches < total else []


def _rows(model: SentenceTransformer, sums: _Sums, seed: int, notes: list[str]) -> tuple[DepthRow, ...]:
    vectors = sums.vectors
    columns: dict[str, Sequence[float | None]] = {
        "block_influence": (sums.influence / sums.tokens).tolist(),
        "effective_rank": [_number(effective_rank(here)) for here in vectors],
        "uniformity": [uniformity(here) for here in vectors],
        "mean_cosine": [mean_cosine(here) for here in vectors],
        **_supervised(sums, seed, notes),
    }
    flat = [str(depth) for depth, rank in enumerate(columns["effective_rank"], start=1) if rank is None]
    if flat:
        notes.append(f"all vectors are the same at depth {', '.join(flat)}: no effective rank and no CKA there")
    lens = find_lens(model) if sums.targets else None
    if lens is not None:
        losses = lens.losses(torch.cat(sums.states), torch.cat(sums.targets)).tolist()
        columns["next_token_loss"] = [_number(loss) for loss in losses]
        lost = [str(depth) for depth, loss in enumerate(losses, start=1) if not math.isfinite(loss)]
        if lost:
            notes.append(
                f"the next-token loss is no number at depth {', '.join(lost)}: the language-model head holds NaN, or "
                "overflows in this dtype"
            )
    values = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return tuple(DepthRow(depth=depth, **row) for depth, row in enumerate(values, start=1))


def _supervised(sums: _Sums, seed: int, notes: list[str]) -> dict[str, Sequence[float | None]]:
    """The columns that need pairs."""
    depths = len(sums.influence)
    if not sums.batch_losses:
        notes.append("texts alone: no loss, accuracy, nDCG@10 and alignment")
        return {"loss": [None] * depths, "loss_se": [None] * depths}
    losses = sums.losses.double()
    columns: dict[str, Sequence[float | None]] = {
        "loss": losses.mean(dim=0).tolist(),
        "loss_se": [None] * depths,
        "accuracy": torch.stack(sums.accuracy).mean(dim=0).tolist(),
        "ndcg_at_10": torch.stack(sums.ndcg).mean(dim=0).tolist(),
        "alignment": torch.stack(sums.alignment).mean(dim=0).tolist(),
    }
    if len(losses) > 1:
        columns["loss_se"] = (losses.std(dim=0) / math.sqrt(len(losses))).tolist()
    if len(losses) < FEWEST:
        batches = "one batch is" if len(losses) == 1 else f"{len(losses)} batches are"
        notes.append(f"{batches} too few for intervals and chances of the losses: it takes {FEWEST}")
        return columns
    draws = draws_of(losses, seed)
    low, high = zip(*(interval(own.numpy()) for own in draws.T), strict=True)
    return columns | {"loss_low": low, "loss_high": high, "chance": chances(draws, lowest_in_each_half).tolist()}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _table(matrix: Tensor) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(_number(value) for value in row) for row in matrix.double().tolist())
