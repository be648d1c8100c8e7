"""What stands before texts while a model is trained, and from then on wherever it is used.

Data bring their own instructions. Where they bring none, texts are trained with the model's default prompt, which
sentence-transformers puts before every text that comes without another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from sentence_transformers import SentenceTransformer

from secateur.data.sources import Pairs, Source, Texts
from secateur.errors import ConfigError
from secateur.healing.train import TrainingSet


def default_prompt(model: SentenceTransformer) -> str:
    """What a model puts before texts that come without a prompt."""
    return str(model.prompts.get(model.default_prompt_name or "") or "")


def prompts_of(item: TrainingSet, default: str) -> Mapping[str, str]:
    """The prompt of each column of a set, with ``default`` before all where the data bring none."""
    return item.prompts or (dict.fromkeys(item.rows.column_names, default) if default else {})


def check_room(model: SentenceTransformer, prompts: Iterable[str], max_length: int) -> None:
    """Refuse a length that leaves no token for a text after its prompt and the special tokens.

    A tokenizer that is asked for fewer tokens than its special ones cuts nothing at all.

    Raises:
        ConfigError: It leaves none.
    """
    least, prompt = max((len(model.tokenizer(f"{prompt}a")["input_ids"]), prompt) for prompt in {*prompts, ""})
    length = min(max_length, model.max_seq_length or max_length)
    if length < least:
        before = f'the prompt "{prompt:.60}"' if prompt else "the special tokens"
        raise ConfigError("max_length", length, f"is {length}: {before} would fill all of it", f"{least} or more")


def keep_prompts(model: SentenceTransformer, sources: Sequence[Source], default: str) -> dict[str, str]:
    """Give a model the prompts that it is trained with, in place of those it has; and tell them.

    The default prompt stays where it is trained with. Texts alone without an instruction leave all as it is.

    Args:
        model: The model.
        sources: The data that it is trained on.
        default: What goes before data without an instruction.
    """
    silent = [source for source in sources if not _brings(source)]
    told = model_prompts([_with(source, default) if source in silent else source for source in sources])
    if len(silent) == len(sources) and all(isinstance(source, Texts) for source in sources):
        return told
    name = model.default_prompt_name if silent and default else None
    model.prompts = {"query": "", "document": ""} | ({name: default} if name else {}) | told
    model.default_prompt_name = name
    return told


def _brings(source: Source) -> bool:
    return bool(source.prompt or (isinstance(source, Pairs) and source.passage_prompt))


def _with(source: Source, prompt: str) -> Source:
    if isinstance(source, Pairs):
        return replace(source, prompt=prompt, passage_prompt=prompt)
    return replace(source, prompt=prompt)


def model_prompts(sources: Sequence[Source]) -> dict[str, str]:
    """The prompts of data: by data set, and as ``query`` and ``document`` where all data agree.

    Texts alone without a prompt have no say.
    """
    told = [source for source in sources if isinstance(source, Pairs) or source.prompt]
    prompts = {source.name: source.prompt for source in told if source.prompt}
    queries = {source.prompt for source in told}
    passages = {source.passage_prompt if isinstance(source, Pairs) else source.prompt for source in told}
    if len(queries) == len(passages) == 1:
        prompts |= {"query": queries.pop(), "document": passages.pop()}
    return prompts
