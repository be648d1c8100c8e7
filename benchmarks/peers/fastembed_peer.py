"""fastembed, on an export to ONNX that pools and normalises by itself."""

import json
from pathlib import Path

from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
from protocol import answer


def load(settings):
    folder = settings["model"]
    width = json.loads((Path(folder) / "export.json").read_text())["dimension"]
    TextEmbedding.add_custom_model(
        folder,
        pooling=PoolingType.DISABLED,
        normalization=False,
        sources=ModelSource(hf="none/none"),
        dim=width,
        model_file=settings["file"],
        output_name="sentence_embedding",
    )
    model = TextEmbedding(folder, specific_model_path=folder, threads=settings["threads"])
    return lambda texts, size: list(model.embed(texts, batch_size=size)), ""


answer(load)
