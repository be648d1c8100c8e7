"""The numbers of a training, named sets of them, and the weights that it changes.

``lora``    adapters on every linear module of the layers, merged at the end (Hu et al. 2021, arXiv:2106.09685)
``blocks``  all weights of the layers and the final norm, but not the token embeddings
``all``     every weight
``auto``    ``blocks`` where the optimizer's state fits into half of the memory, else ``lora``
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers, MultiDatasetBatchSamplers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from secateur.data.sources import Source, Texts
from secateur.errors import ConfigError, UnsupportedArchitecture
from secateur.models import model_source
from secateur.models.blocks import blocks_of, final_norm, linear_names
from secateur.models.compat import multiplies_bfloat16
from secateur.options import HealOptions

LEARNING_RATES = {"lora": 2e-4, "blocks": 5e-4, "all": 5e-4}
"""Peak learning rate by what is trained: the first is the paper's, docs/explanation/defaults.md measured the others."""

CHECKPOINTS = 10
"""How many a training writes on its way, so that a killed one loses at most a tenth."""
LOGGED = 100
"""About how many losses a training logs."""
SCORE = "eval_score"

BYTES_PER_WEIGHT = 16
"""Of a trained weight in float32: itself, its gradient and AdamW's two moments."""


@dataclass(frozen=True)
class TrainingConfig:
    """All numbers of a training, none left open; the defaults are the paper's (L3Prune, arXiv 2410.14578, section 4).

    The names are those of :class:`.HealOptions`. ``learning_rate`` is None, and ``train`` may be ``auto``, until the
    model is known (:func:`decide`).

    Attributes:
        recipe: Where the numbers that were not given come from.
        has_teacher: Whether a teacher's vectors are learned from.
        unsupervised: Whether each text without a label is its own positive, under dropout (SimCSE, arXiv 2104.08821).
    """

    recipe: str = "l3prune"
    steps: int = 1000
    batch_size: int = 64
    train: str = "lora"
    learning_rate: float | None = None
    warmup: float = 0.3
    scale: float = 50.0
    max_length: int = 512
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    mini_batch_tokens: int | None = None
    gradient_checkpointing: bool = False
    precision: str = "auto"
    seed: int = 42
    has_teacher: bool = False
    teacher_weight: float = 0.5
    distill: str = "vectors"
    depths: tuple[int, ...] = ()
    layers: str = "first"
    dims: tuple[int, ...] = ()
    unsupervised: bool = False
    eval_every: int | None = None
    patience: int | None = None

    @property
    def objective(self) -> str:
        """What the loss is made of, in words."""
        if self.has_teacher:
            return "distillation" if self.teacher_weight == 1 else "contrastive loss and distillation"
        return "contrastive loss" + (", each text its own positive under dropout (SimCSE)" if self.unsupervised else "")

    def uses_bfloat16(self, device: torch.device | None = None) -> bool:
        """``precision``, with ``auto`` decided for a device (default: a GPU where there is one): bfloat16 where it
        multiplies in it.
        """
        if self.precision != "auto":
            return self.precision == "bfloat16"
        if device.type == "cuda" if device else torch.cuda.is_available():
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return multiplies_bfloat16()


_FINETUNE: Mapping[str, Any] = {"train": "auto", "warmup": 0.1, "scale": 20.0, "max_length": 128}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "finetune": _FINETUNE,
    "l3prune": {},
    "distill": {**_FINETUNE, "learning_rate": 1e-3},
}
"""Named defaults: the layers' own weights are trained, the paper's, and a teacher on unlabelled texts
(docs/explanation/defaults.md says how they were found)."""
ADAPTERS = ("lora_rank", "lora_alpha", "lora_dropout")
"""Numbers of adapters, which have no effect where ``train`` is not ``lora``."""


def training_config(options: HealOptions, sources: Sequence[Source] = ()) -> TrainingConfig:
    """The numbers that were given, the rest from a recipe; ConfigError if an option has no effect.

    The data decide on the default recipe and on the teacher's weight. Without any, pairs are taken for granted.
    """
    if options.teacher is None:
        for key in ("teacher_weight", "distill", "cache"):
            if getattr(options, key) is not None:
                raise ConfigError(key, getattr(options, key), "there is no teacher", "name one with --teacher")
    texts = [isinstance(source, Texts) for source in sources]
    has_pairs, has_teacher = not (texts and all(texts)), options.teacher is not None
    if not has_pairs and options.teacher_weight not in (None, 1):
        problem = "texts alone are learned from the teacher alone"
        raise ConfigError("teacher_weight", options.teacher_weight, problem, "leave it out, or give pairs")
    weight = (0.5 if options.teacher_weight is None else options.teacher_weight) if has_pairs else 1.0
    recipe = options.recipe or ("distill" if has_teacher and weight == 1 else "finetune")
    names = {field.name for field in fields(TrainingConfig)} & HealOptions.model_fields.keys()
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    given |= {"recipe": recipe, "depths": tuple(options.depths or ()), "dims": tuple(options.dims or ())}
    given |= {"has_teacher": has_teacher, "teacher_weight": weight, "unsupervised": not has_teacher and any(texts)}
    if weight == 1 and has_teacher and model_source(str(options.teacher)) == model_source(options.model):
        given.setdefault("layers", "uniform")  # the last layers make a trained embedder's vectors
    default = TrainingConfig(**RECIPES[recipe])
    config = TrainingConfig(**{**RECIPES[recipe], **given})
    for key in ADAPTERS if config.train in ("blocks", "all") else ():
        if getattr(config, key) != getattr(default, key):
            problem = f"there are no adapters where train is {config.train}"
            raise ConfigError(key, getattr(config, key), problem, "leave it out, or train lora")
    return config


class Arguments(SentenceTransformerTrainingArguments):  # type: ignore[misc]
    """A training on one device in each process.

    The stock arguments take the first GPU whatever was asked for, and of several all, each with a batch of its own.
    """

    place: torch.device | None = None  # where there is one process

    @property
    def n_gpu(self) -> int:
        return min(1, int(super().n_gpu))

    @property
    def device(self) -> torch.device:
        own: torch.device = super().device
        return self.place or own


def training_arguments(
    config: TrainingConfig,
    folder: Path,
    prompts: Mapping[str, Mapping[str, str]] | None = None,
    *,
    device: torch.device | None = None,
    evaluated: bool = False,
    report_to: str = "none",
) -> Arguments:
    """A decided configuration as the trainer takes it, with the prompts by set and column.

    ``device`` is that of the model; None where each of several processes has its own.
    """
    log_every = max(1, config.steps // LOGGED)
    # A logged loss is the mean since the one before: a checkpoint between two would lose the steps that led to it.
    save_every = log_every * math.ceil(config.steps / CHECKPOINTS / log_every)
    if evaluated and config.eval_every:
        save_every = config.eval_every
        log_every = math.gcd(log_every, save_every)
    arguments = Arguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        # A batch is drawn whole and divided among the processes, so that their number changes no loss.
        accelerator_config={"split_batches": True},
        learning_rate=config.learning_rate,
        warmup_steps=min(round(config.warmup * config.steps), config.steps - 1),  # the first of them is at rate 0
        lr_scheduler_type="linear",
        bf16=config.uses_bfloat16(device),
        use_cpu=device.type == "cpu" if device else not torch.cuda.is_available(),
        activation_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        data_seed=config.seed,
        dataloader_drop_last=True,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        multi_dataset_batch_sampler=MultiDatasetBatchSamplers.PROPORTIONAL,
        prompts={name: dict(own) for name, own in (prompts or {}).items() if own} or None,
        eval_strategy="steps" if evaluated else "no",
        eval_steps=save_every,
        load_best_model_at_end=evaluated,
        metric_for_best_model=SCORE if evaluated else None,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        logging_steps=log_every,
        logging_nan_inf_filter=False,
        report_to=report_to,
        disable_tqdm=True,
    )
    arguments.mixed_precision = "bf16" if arguments.bf16 else "no"  # whatever accelerate's configuration says
    if device is not None:
        arguments.place = device
        if device.type == "cuda":  # accelerate takes the current one
            torch.cuda.set_device(device)
    return arguments


def decide(model: SentenceTransformer, config: TrainingConfig) -> TrainingConfig:
    """The configuration with ``auto`` and the learning rate decided for this model on this machine.

    Training all weights of the layers is the default where it fits: for small cuts it is quicker than adapters and
    not worse (docs/explanation/defaults.md). All of the device's memory counts, used or not, so that a training that
    was stopped finds the same answer when it is resumed.
    """
    train = config.train
    if train == "auto":
        weights = sum(p.numel() for p in blocks_of(model[0].auto_model).parameters())
        on_gpu = model.device.type == "cuda"
        memory = (
            torch.cuda.get_device_properties(model.device).total_memory if on_gpu else psutil.virtual_memory().total
        )
        train = "blocks" if 2 * BYTES_PER_WEIGHT * weights <= memory else "lora"
    rate = LEARNING_RATES[train] if config.learning_rate is None else config.learning_rate
    return replace(config, train=train, learning_rate=rate)


def prepare(model: SentenceTransformer, config: TrainingConfig) -> Mapping[str, torch.dtype]:
    """Make a model's weights trainable as a decided configuration says, in place.

    What is trained is kept in float32, whatever the precision: an update is often smaller than the last bit of a
    bfloat16. Under adapters the others stay as they are stored, which takes half of the memory, unless float32 is asked
    for. Returns the dtype of each weight before, which :func:`finish` wants back.
    """
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    torch.manual_seed(config.seed)
    if config.train == "lora":
        model.requires_grad_(False)
        add_adapters(model[0].auto_model, config)
    elif config.train == "blocks":
        model.requires_grad_(False)
        for part in (blocks_of(model[0].auto_model), final_norm(model[0].auto_model)):
            part.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad or config.train != "lora" or config.precision == "float32":
            parameter.data = parameter.data.float()
    return dtypes


def add_adapters(transformer: PreTrainedModel, config: TrainingConfig) -> None:
    """Put an adapter on every linear module of a model's layers."""
    targets = list(linear_names(transformer))
    if not targets:
        problem = "its layers have no linear modules that an adapter could stand on"
        raise UnsupportedArchitecture(type(transformer).__name__, problem, "--train blocks, or all")
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        bias="none",
        target_modules=targets,
    )
    # Of a whole model, peft would look at the type: it takes packed experts for targets, which cannot have dropout.
    inject_adapter_in_model(lora, blocks_of(transformer))
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer) and transformer.device.type == "cpu":
            for name, dropout in layer.lora_dropout.items():
                layer.lora_dropout[name] = BitsDropout(dropout.p) if isinstance(dropout, nn.Dropout) else dropout


def finish(model: SentenceTransformer, dtypes: Mapping[str, torch.dtype]) -> None:
    """The model as it came, but trained, in place: adapters merged, dtypes restored, in evaluation mode."""
    transformer = model[0].auto_model
    vars(blocks_of(transformer)).pop("peft_config", None)  # which peft leaves on the list of layers
    adapted = [(name, layer) for name, layer in transformer.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge(safe_merge=True)
        transformer.set_submodule(name, layer.get_base_layer())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes[name])
        parameter.requires_grad_(True)
        parameter.grad = None
    model.eval()


class BitsDropout(nn.Dropout):
    """Dropout by 16 random bits for each number, in place of a random float each; ``p`` in steps of 2⁻¹⁶.

    On a CPU the stock one takes a fifth of a step with adapters, each of which has its own dropout.
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


@contextmanager
def attention_in_float32() -> Iterator[None]:
    """Within: transformers' ``sdpa`` attention leaves autocast.

    On a CPU, its backward pass takes twice to three times as long in bfloat16 (benchmarks/training_step.py).
    """

    def widened(given: Any) -> Any:
        return given.float() if isinstance(given, Tensor) and given.is_floating_point() else given

    def attend(module: nn.Module, *inputs: Any, **options: Any) -> tuple[Tensor, None]:
        options = {name: widened(given) for name, given in options.items()}
        with torch.autocast("cpu", enabled=False):
            found: tuple[Tensor, None] = sdpa_attention_forward(module, *map(widened, inputs), **options)
        return found

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # the stock one stands behind it
