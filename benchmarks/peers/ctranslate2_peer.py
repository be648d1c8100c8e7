"""CTranslate2's encoder, whose last states are pooled here, by their mean: it knows no pooling but BERT's own."""

import ctranslate2
import numpy as np
from protocol import answer
from tokenizers import Tokenizer


def load(settings):
    if settings["pooling"] != "mean_tokens":
        raise SystemExit("pooled by the mean alone here")
    folder, threads, dtype = settings["model"], settings["threads"], settings["dtype"]
    encoder = ctranslate2.Encoder(folder, device="cpu", compute_type=dtype, intra_threads=threads)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.enable_truncation(settings["max_length"])
    tokenizer.no_padding()

    def encode(texts, size):
        ids = [found.ids for found in tokenizer.encode_batch(texts)]
        order = sorted(range(len(texts)), key=lambda place: -len(ids[place]))
        batches = (order[start : start + size] for start in range(0, len(order), size))
        vectors = np.concatenate([pool([ids[place] for place in batch]) for batch in batches])
        return vectors[np.argsort(order)]

    def pool(ids):
        found = encoder.forward_batch(ids).last_hidden_state
        states = np.array(found.to(ctranslate2.DataType.float32))
        mask = np.arange(states.shape[1]) < np.array([len(each) for each in ids])[:, None]
        vectors = (states * mask[..., None]).sum(axis=1)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return encode, encoder.compute_type


answer(load)
