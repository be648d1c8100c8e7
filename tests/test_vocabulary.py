"""A model with fewer tokens: texts whose tokens all stay are encoded as before, and no text loses its tokens."""

from __future__ import annotations

import itertools
import json
import shutil
import zlib
from collections import Counter
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, Qwen4ExpTextConfig

import architectures
import secateur
from published import CORPUS, EVERY, PUBLISHED, SCRIPTS, SHORT, assert_same_where_all_tokens_stay, write_model
from secateur.errors import ConfigError, DataError, UnsupportedArchitecture
from secateur.models.blocks import skeleton
from secateur.results import Origin, load
from secateur.vocabulary.choice import Vocabulary, count_tokens
from secateur.vocabulary.trim import cut_vocabulary, keep_tokens, token_tables
from task_folders import example_rows, write_task


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory):
    return cache(lambda name: write_model(tmp_path_factory.mktemp("published") / name, name))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(line for line in CORPUS if line.strip()), encoding="utf-8")
    return file


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the most memory so far is told by Linux")
def test_of_many_long_texts_a_few_are_tokenized_at_once():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    def megabytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) >> 10

    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    counts = count_tokens(tokenizer, [[f"{i} {'a b ' * 1250}" for i in range(1024)]])
    assert counts.counted == pytest.approx([0.5, 0.5], abs=1e-3)
    assert megabytes("VmHWM") - before < 150, "all that a tokenizer makes of them is some 250"


@pytest.mark.parametrize("name", PUBLISHED)
def test_texts_whose_tokens_stay_give_the_same_ids_and_vectors(name: str, folder_of, texts: Path, tmp_path: Path):
    source, out = folder_of(name), tmp_path / "cut"
    old = AutoTokenizer.from_pretrained(source)
    secateur.prune(source, vocab=[texts], vocab_size=len(old) - 120, out=out)
    new, alone = AutoTokenizer.from_pretrained(out), Tokenizer.from_file(str(out / "tokenizer.json"))
    alone.no_padding()
    alone.no_truncation()
    assert len(new) == len(old) - 120
    assert type(new) is type(old)
    kept = sorted(new.get_vocab(), key=new.get_vocab().get)
    assert kept == sorted(kept, key=old.get_vocab().get), "the order of the tokens stays"
    assert old.all_special_tokens == new.all_special_tokens
    texts_of_both = [*SCRIPTS, *SHORT, *CORPUS[:300]]
    unchanged = assert_same_where_all_tokens_stay(old, new, alone, texts_of_both, EVERY)
    assert 50 < len(unchanged) < 700
    some = unchanged[:: len(unchanged) // 20]
    before = secateur.open_model(source, device="cpu").encode(some, convert_to_tensor=True)
    after = SentenceTransformer(str(out), device="cpu").encode(some, convert_to_tensor=True)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    assert sorted(file.name for file in out.glob("*token*")) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert not list(out.glob("*vocab*")) + list(out.glob("*merges*")) + list(out.glob("*.model"))


@pytest.mark.parametrize("name", sorted(architectures.ARCHITECTURES.keys() - architectures.REFUSED))
def test_every_architecture_follows_its_vocabulary(name: str, tmp_path: Path):
    model = architectures.model_of(name)
    kept = (0, 1, 2, *range(4, architectures.VOCABULARY, 3))
    new = torch.tensor([[5, 6, 7, 8, 20, 30, 3], [9, 8, 7, 1, 1, 11, 3]])
    mask = torch.ones_like(new)
    before = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(kept)[new], attention_mask=mask).last_hidden_state
        each = sum(table.width for table in token_tables(name, model))
        cut_vocabulary(name, model, kept)
        model.save_pretrained(tmp_path)
        back = type(model).from_pretrained(tmp_path).eval()
        for cut in (model, back):
            found = cut(input_ids=new, attention_mask=mask).last_hidden_state
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            gone = before - sum(parameter.numel() for parameter in cut.parameters())
            assert gone == each * (architectures.VOCABULARY - len(kept))


def test_the_most_frequent_tokens_stay_and_the_coverage_is_that_of_held_out_texts(
    folder_of, texts: Path, tmp_path: Path
):
    source, out = folder_of("qwen2"), tmp_path / "cut"
    secateur.prune(source, vocab=[texts], vocab_coverage=0.9, out=out)
    old, new = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(out)
    lines = texts.read_text(encoding="utf-8").splitlines()
    held_out = [line for line in lines if zlib.crc32(line.encode()) % 10 == 0]
    counts = Counter(chain.from_iterable(old.tokenize(line) for line in lines if line not in held_out))
    there = new.get_vocab().keys()
    rarest = min(counts[token] for token in there if len(token) > 1 and token in counts)
    assert all(token in there for token, count in counts.items() if count > max(rarest, 40))
    tokens = list(chain.from_iterable(old.tokenize(line) for line in held_out))
    record = load(out, Origin).vocabulary
    assert record.row.coverage == pytest.approx(sum(token in there for token in tokens) / len(tokens))
    assert 0.9 <= record.row.coverage < 0.92
    changed = [not there >= set(old.tokenize(line)) for line in held_out]
    assert record.row.changed == pytest.approx(sum(changed) / len(changed))
    assert record.tokens_per_text == pytest.approx(len(tokens) / len(held_out))
    after = sum(len(new.tokenize(line)) for line in held_out)
    assert record.row.tokens_per_text == pytest.approx(after / len(held_out)) and after > len(tokens)
    assert (record.row.tokens, record.tokens, record.texts) == (len(new), len(old), len(lines))
    assert record.row.parameters == len(new) * architectures.WIDTH


def test_depth_and_vocabulary_are_cut_together_and_again(folder_of, texts: Path, tmp_path: Path):
    source = folder_of("bert")
    secateur.prune(source, 3, vocab=[texts], vocab_size=300, vocab_multiple=64, out=tmp_path / "both")
    one = SentenceTransformer(str(tmp_path / "both"), device="cpu")
    assert one[0].auto_model.config.num_hidden_layers == 3
    assert one[0].auto_model.get_input_embeddings().num_embeddings == one[0].auto_model.config.vocab_size == 320
    assert not one[0].auto_model.get_input_embeddings().weight[300:].any()
    secateur.prune(tmp_path / "both", 2, out=tmp_path / "less")
    secateur.prune(tmp_path / "less", vocab=[texts], vocab_size=250, out=tmp_path / "least")
    record = load(tmp_path / "least", Origin)
    assert (record.kept, record.depth) == ((0, 1), 6)
    assert (record.vocabulary.row.tokens, record.vocabulary.tokens) == (250, 500)
    assert load(tmp_path / "less", Origin).vocabulary == load(tmp_path / "both", Origin).vocabulary
    # The oracle: the whole model with the first blocks alone, on the same tokens by their old ids.
    least = SentenceTransformer(str(tmp_path / "least"), device="cpu")
    whole, old = secateur.open_model(source, device="cpu"), AutoTokenizer.from_pretrained(source)
    for text in ("the word one", "Text, wrapped twice"):
        features = least.tokenizer(text, return_tensors="pt")
        tokens = least.tokenizer.convert_ids_to_tokens(features["input_ids"][0].tolist())
        ids = torch.tensor([old.convert_tokens_to_ids(tokens)])
        with torch.no_grad(), architectures.bypassed(whole[0].auto_model, (0, 1)):
            states = whole[0].auto_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        expected = torch.nn.functional.normalize(states.mean(dim=1), dim=1)[0]
        found = least.encode(text, convert_to_tensor=True)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_prompts_of_the_data_keep_their_tokens(folder_of, tmp_path: Path):
    source, rows = folder_of("bert"), [{"query": f"the {i}", "positive": f"a {i}"} for i in range(200)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "pairs.json").write_text(json.dumps({"query_instruction": "Return wrapped paragraphs"}))
    old = AutoTokenizer.from_pretrained(source)
    secateur.prune(source, vocab=[data], vocab_coverage=0.5, out=tmp_path / "cut")
    new = AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert new.tokenize("Return wrapped paragraphs") == old.tokenize("Return wrapped paragraphs")
    assert len(new) < len(old)
    (tmp_path / "texts.txt").write_text("".join(f"the {i}\n" for i in range(200)))
    (tmp_path / "texts.json").write_text("[1]")  # which is of something else: plain text has no file beside it
    secateur.prune(source, vocab=[tmp_path / "texts.txt"], vocab_coverage=0.5, out=tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"vocab_size": 10_000}, "at most 500"),
        ({"vocab_size": 5}, "at least"),
        ({"vocab_size": 300, "vocab_coverage": 0.9}, "cannot go with vocab_size"),
        ({"vocab_coverage": 1.5}, "less than or equal to 1"),
        ({"vocab_size": 300, "vocab": []}, "give --vocab FILE"),
        ({"vocab_multiple": 64, "vocab": []}, "vocab_multiple: needs texts .* give --vocab FILE"),
        ({"vocab_size": 300, "trust_remote_code": True}, "own code"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, told: str, folder_of, texts: Path, tmp_path: Path):
    given = {"vocab": [texts], **options}
    with pytest.raises(ConfigError, match=told):
        secateur.prune(folder_of("bert"), 2, **given, out=tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_tasks_of_one_name_are_refused_for_the_record_would_lack_one(folder_of, texts: Path, tmp_path: Path):
    tasks = [write_task(tmp_path / side / "task", "sts", example_rows("sts")) for side in ("one", "other")]
    with pytest.raises(ConfigError, match="vocab_tasks: two tasks have the same name"):
        secateur.prune(folder_of("bert"), vocab=[texts], vocab_tasks=tasks, out=tmp_path / "cut")


def test_texts_that_tell_nothing_are_refused(folder_of, tmp_path: Path):
    file = tmp_path / "few.txt"
    file.write_text("one\ntwo\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="2 texts are too few"):
        secateur.prune(folder_of("bert"), vocab=[file], out=tmp_path / "cut")
    for text in ("text 0", "text 2"):  # all are counted, or all held out
        file.write_text(f"{text}\n" * 100, encoding="utf-8")
        with pytest.raises(ConfigError, match="100 texts are too few, or too much alike"):
            secateur.prune(folder_of("bert"), vocab=[file], out=tmp_path / "cut")
    file.write_text("", encoding="utf-8")
    with pytest.raises((ConfigError, DataError), match=r"few\.txt: has no rows"):
        secateur.prune(folder_of("bert"), vocab=[file], out=tmp_path / "cut")


def test_a_tokenizer_without_spare_tokens_is_refused(llama_folder: Path, texts: Path, tmp_path: Path):
    with pytest.raises(UnsupportedArchitecture, match="WordLevel"):
        secateur.prune(llama_folder, vocab=[texts], out=tmp_path / "cut")


def test_a_model_that_hashes_ids_is_refused():
    indexer = {"n_heads": 4, "kv_heads": 1, "head_dim": 256, "budget": 16, "compress_ratio": 4}
    hashes = {"ple_layer_ids": [2], "ngram_vocab_size_base": 50, "eos_token_id": 2}
    config = Qwen4ExpTextConfig(num_hidden_layers=4, **hashes, **{f"indexer_{k}": n for k, n in indexer.items()})
    with pytest.raises(UnsupportedArchitecture, match=r"ple_embedding computes with the number of tokens, and so with"):
        token_tables("m", skeleton(config))


def test_a_character_model_is_refused(folder_of, texts: Path, tmp_path: Path):
    source = tmp_path / "canine"
    shutil.copytree(folder_of("bert"), source)
    for file in source.glob("*token*"):
        file.unlink()
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CanineTokenizer"}))
    with pytest.raises(UnsupportedArchitecture, match="no list of tokens"):
        secateur.prune(source, vocab=[texts], out=tmp_path / "cut")


def test_what_an_unknown_character_costs_stays():
    """Unigram makes it 10 less likely than the least likely token, which decides between two splits of a word."""
    pieces = [("<unk>", 0.0), ("çy", -20.0), ("z", -20.0), ("yz", -1.0), ("over", -6.0), ("never", -60.0)]
    pieces += [(letter, -5.0) for letter in "nevor"]
    whole = Tokenizer(models.Unigram(pieces, unk_id=0))
    assert whole.encode("çyz").tokens == ["çy", "z"]
    vocabulary = Vocabulary(json.loads(whole.to_str()))
    frequency = np.array([0, 0.4, 0.4, 0.2] + [0] * 7)
    kept = sorted(itertools.islice(vocabulary.order(frequency, vocabulary.needed(frequency)), 10))
    cut = Tokenizer.from_str(json.dumps(keep_tokens(vocabulary.rules, kept)))
    assert cut.encode("çyz").tokens == ["çy", "z"]
    assert cut.get_vocab_size() == 10 and "over" not in cut.get_vocab()


def test_of_two_rare_tokens_the_one_that_the_vocabulary_lists_first_stays():
    words = ["common", "rare", "domain", "other", "never"]
    characters = sorted(set("".join([*words, "[unused]"])))
    listed = ["[UNK]", "[unused]", "字", "語", *words, *characters, *(f"##{character}" for character in characters)]
    whole = Tokenizer(models.WordPiece({token: i for i, token in enumerate(listed)}, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # splits at brackets
    vocabulary = Vocabulary(json.loads(whole.to_str()))
    frequency = np.zeros(len(listed))
    frequency[[listed.index(word) for word in ("domain", "other", "rare", "common")]] = 0.5, 0.2, 0.16, 0.14
    needed = vocabulary.needed(frequency)
    order = [listed[i] for i in vocabulary.order(frequency, needed)][len(needed) :]
    assert order == ["domain", "other", "common", "rare", "never", "[unused]", "字", "語"]


def test_each_file_has_the_same_weight(folder_of, texts: Path, tmp_path: Path):
    """A word that is frequent in a small file goes before one that is as frequent in a large one."""
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text("\n".join(f"wrapped text {i}" for i in range(60)), encoding="utf-8")
    large.write_text("\n".join(f"methods here {i}" for i in range(9000)), encoding="utf-8")
    for name, files in (("both", [small, large]), ("large", [large])):
        secateur.prune(folder_of("bert"), 1, vocab=files, vocab_coverage=0.8, out=tmp_path / name)
    both, one = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("both", "large"))
    assert both.tokenize("text") == ["text"] and one.tokenize("text") != ["text"]
