from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from secateur.data.vectors import PROBES, VectorCache, same_as_kept
from secateur.errors import DataError, ModelError


def encode(texts: list[str]) -> np.ndarray:
    return np.array([[len(text), sum(map(ord, text)), 0.1] for text in texts], dtype=np.float32)


def never(texts: list[str]) -> np.ndarray:
    raise AssertionError(f"encoded again: {texts}")


def test_vectors_come_back_in_order_and_no_text_is_encoded_twice(tmp_path: Path):
    asked: list[list[str]] = []

    def counted(texts: list[str]) -> np.ndarray:
        asked.append(texts)
        return encode(texts)

    cache = VectorCache(tmp_path, "m")
    cache.encode(["a", "bb", "a"], "", counted)
    assert np.array_equal(cache.encode(["ccc", "bb", "a", "ccc"], "", counted), encode(["ccc", "bb", "a", "ccc"]))
    assert asked == [["a", "bb"], ["ccc"]]
    again = VectorCache(tmp_path, "m")
    assert len(again) == 3
    assert np.array_equal(again.encode(["bb", "ccc"], "", never), encode(["bb", "ccc"]))


def test_another_model_or_prompt_is_another_vector(tmp_path: Path):
    VectorCache(tmp_path, "m").encode(["a"], "", encode)
    for cache, context in ((VectorCache(tmp_path, "m"), "query: "), (VectorCache(tmp_path, "other"), "")):
        with pytest.raises(AssertionError, match="encoded again"):
            cache.encode(["a"], context, never)


@pytest.mark.parametrize("damage", ["no keys", "half the vectors", "half the keys", "rubbish", "other length"])
def test_what_a_killed_writer_left_is_not_there(damage: str, tmp_path: Path):
    cache = VectorCache(tmp_path, "m")
    cache.encode(["a", "b"], "", encode)
    cache.encode(["c"], "", encode)
    keys = next(f for f in cache.folder.glob("*.keys.npy") if np.load(f).shape[0] == 2)
    vectors = keys.with_name(keys.name.replace(".keys", ""))
    if damage == "no keys":
        keys.unlink()
    elif damage == "rubbish":
        vectors.write_bytes(b"rubbish")
    elif damage == "other length":
        np.save(vectors, encode(["a", "b", "c"]))
    else:
        file = vectors if "vectors" in damage else keys
        file.write_bytes(file.read_bytes()[:-8])
    again = VectorCache(tmp_path, "m")
    assert len(again) == 1
    assert np.array_equal(again.encode(["a", "c", "b"], "", encode), encode(["a", "c", "b"]))


def test_two_writers_at_once(tmp_path: Path):
    one, two = VectorCache(tmp_path, "m"), VectorCache(tmp_path, "m")
    one.encode(["a", "b"], "", encode)
    two.encode(["b", "c"], "", encode)
    assert np.array_equal(VectorCache(tmp_path, "m").encode(["a", "b", "c"], "", never), encode(["a", "b", "c"]))


def test_more_files_than_a_process_may_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each mapped file takes a descriptor, of which a process often has 1,024."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    texts = [f"text {i}" for i in range(150)]
    cache = VectorCache(tmp_path, "m")
    for i, text in enumerate(texts):
        cache.encode([text], "", lambda _, i=i: np.full((1, 2), i, dtype=np.float32))
    for known in (cache, VectorCache(tmp_path, "m")):
        assert known.missing(texts, "") == []
        assert known.read(known.rows(texts, ""))[:, 0].tolist() == list(range(150))
    held = [os.path.realpath(descriptor) for descriptor in Path("/proc/self/fd").iterdir()]
    assert 0 < len([name for name in held if name.startswith(str(tmp_path.resolve()))]) <= 64


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path):
    cache = VectorCache(tmp_path, "m")
    cache.encode(["a"], "", encode)
    file = next(file for file in cache.folder.glob("*.npy") if "keys" not in file.name)
    file.unlink()
    file.mkdir()
    with pytest.raises(DataError, match=r"kept vectors cannot be read \(Is a directory\)"):
        VectorCache(tmp_path, "m")


def test_vectors_of_other_library_versions_are_not_taken(tmp_path: Path):
    VectorCache(tmp_path, "m", "torch 2.13.0").encode(["a"], "", encode)
    assert len(VectorCache(tmp_path, "m", "torch 2.13.0")) == 1
    assert len(VectorCache(tmp_path, "m", "torch 2.12.0")) == 0


def test_zeros_are_another_model_but_for_one_that_gives_zeros(tmp_path: Path):
    """A static embedding has no vector for a text of unknown words."""
    kept = encode(list(PROBES))
    kept[1] = 0
    cache = VectorCache(tmp_path, "m")
    for now in (kept, kept * 3):
        assert np.array_equal(same_as_kept("m", cache, "probes", now), kept)
    with pytest.raises(ModelError, match=r"is not the model that the vectors in .* are of \(cosine 0.000"):
        same_as_kept("m", cache, "probes", kept * 0)
