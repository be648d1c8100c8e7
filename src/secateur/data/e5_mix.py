"""The public E5 mix as curated for Echo embeddings (arXiv 2402.15449): 14 files in a folder, instructions apart.

The paper trains on it. The files hold ``query``, ``positive`` and ``negative``; the instructions are in the papers
only (Wang et al. 2024, arXiv 2401.00368, table 13; LLM2Vec, arXiv 2404.05961, table 8). Where those give two for one
set, half of whose rows has each, the first is used for all.
"""

from __future__ import annotations

from pathlib import Path

_WIKIPEDIA = "Given a question, retrieve Wikipedia passages that answer the question"
_CHINESE = "Given a Chinese search query, retrieve web passages that answer the question"

INSTRUCTIONS = {
    "allnli": "Given a premise, retrieve a hypothesis that is entailed by the premise",
    "dureader": _CHINESE,
    "eli5_question_answer": "Provided a user question, retrieve the highest voted answers on Reddit ELI5 forum",
    "fever": "Given a claim, retrieve documents that support or refute the claim",
    "hotpot_qa": "Given a multi-hop question, retrieve documents that can help answer the question",
    "miracl": _WIKIPEDIA,
    "mrtydi": _WIKIPEDIA,
    "msmarco_passage": "Given a web search query, retrieve relevant passages that answer the query",
    "msmarco_document": "Given a web search query, retrieve relevant documents that answer the query",
    "nq": _WIKIPEDIA,
    "quora_duplicates": "Given a question, retrieve questions that are semantically equivalent to the given question",
    "squad": "Retrieve Wikipedia passages that answer the question",
    "t2ranking": _CHINESE,
    "trivia_qa": "Retrieve Wikipedia passages that answer the question",
}
"""By the name of the file, without ``.jsonl``."""


def instruction_of(file: Path) -> str:
    """The instruction of a file of the mix; empty for one that does not stand among all 14."""
    if file.name.removesuffix(".jsonl") not in INSTRUCTIONS or not file.name.endswith(".jsonl"):
        return ""
    whole = all((file.parent / f"{name}.jsonl").is_file() for name in INSTRUCTIONS)
    return INSTRUCTIONS[file.name.removesuffix(".jsonl")] if whole else ""
