"""sentence-transformers, on PyTorch."""

import torch
from protocol import answer
from sentence_transformers import SentenceTransformer


def load(settings):
    torch.set_num_threads(settings["threads"])
    dtype = getattr(torch, settings["dtype"])
    model = SentenceTransformer(settings["model"], device="cpu", model_kwargs={"dtype": dtype})
    # NumPy has no bfloat16, so tensors.
    options = {"show_progress_bar": False, "convert_to_numpy": False, "convert_to_tensor": True}
    return lambda texts, size: model.encode(texts, batch_size=size, **options).float().numpy(), ""


answer(load)
