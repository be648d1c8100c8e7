"""Options of what runs a model: export, encode, serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from secateur.options.base import (
    MODEL,
    Data,
    Device,
    Files,
    MaxLength,
    Model,
    ModelName,
    Names,
    Options,
    Pooling,
    Sample,
    SampleSeed,
    Tasks,
    TrustRemoteCode,
    argument,
    output,
)

Backend = Annotated[
    Literal["auto", "torch", "onnx", "openvino"],
    Field(
        description="What runs the model on a CPU: PyTorch, ONNX Runtime or OpenVINO (for these it is converted once, "
        "into its own folder); auto: the fastest of those installed that keeps --min-cosine, or PyTorch if it finishes "
        "before a conversion would. A GPU always uses PyTorch."
    ),
]
Arithmetic = Annotated[
    Literal["auto", "float32", "bfloat16", "float16", "int8", "stored"],
    Field(
        description="Data type of the matrix products: float32; bfloat16; float16; int8 (not in PyTorch); "
        "stored: PyTorch, as the weights are; auto: the fastest that keeps --min-cosine."
    ),
]
MinCosine = Annotated[
    float,
    Field(
        ge=-1,
        le=1,
        description="Lowest cosine to PyTorch's float32 vectors that auto accepts, measured on some of your texts; "
        "0.98 allows int8.",
    ),
]
BatchTokens = Annotated[
    int | None,
    Field(ge=1, description="Tokens in a batch, padding included [default: 1,024 on a CPU, 8,192 on a GPU]."),
]


class ExportOptions(Options):
    """Write a model for ONNX Runtime or OpenVINO, and compare it with the original.

    Example: secateur export smollm2-large-healed --to openvino --precision int8 -o smollm2-large-int8
    """

    model: Model
    out: Annotated[Path, Names("new folder")] = output("The folder to write.")
    to: Literal["onnx", "openvino"] = Field("onnx", description="Backend that will run the model.")
    precision: Literal["float32", "float16", "bfloat16", "int8"] = Field(
        "float32", description="Precision of the exported weights; int8 is the smallest and the fastest."
    )
    quantization: Literal["static", "dynamic"] | None = Field(
        None,
        description="With int8, how activations are quantized: with ranges calibrated on texts (static), or anew in "
        "each batch (dynamic) [default: the faster on the backend].",
    )
    data: Data = Field(
        [], description="Texts or pairs to calibrate on and to compare vectors on [default: documentation of Python]."
    )
    dimensions: int | None = Field(None, ge=1, description="Truncate vectors to this many dimensions (Matryoshka).")
    vectors: Literal["float32", "int8", "uint8", "binary", "ubinary"] = Field(
        "float32", description="Precision of the vectors that the light runtime returns by default."
    )
    tasks: Tasks = Field([], description="Tasks to score the original and the export on, as for evaluate.")
    sample: Sample = None
    seed: SampleSeed = 42
    min_cosine: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="Fail where a text's cosine with the original's is lower [default: by precision].",
    )
    max_loss: float = Field(0.5, ge=0, description="Fail where the average score falls by more points of 100.")
    pooling: Pooling = None
    max_length: MaxLength = 512
    trust_remote_code: TrustRemoteCode = False


class EncodeOptions(Options):
    """Encode files of texts into one file of vectors; a run that was killed goes on where it stopped.

    Example: secateur encode smollm2-large-healed articles.jsonl -o articles.parquet
    """

    model: ModelName = argument(MODEL + " Or a folder that export wrote.")
    files: Files = argument("Texts: .jsonl, .csv, .tsv or .txt, one on each line, also .gz; or .parquet.", min_length=1)
    out: Annotated[Path, Names("new file")] = output("The file to write: .parquet, .arrow (or .feather), or .npy.")
    column: str | None = Field(None, description="Column (or key) with the texts [default: text, or the first known].")
    prompt_name: str | None = Field(None, description="The model's prompt before each text [default: its default one].")
    instruction: str | None = Field(None, description="Instruction to put before each text, instead of a named prompt.")
    normalize: bool = Field(False, description="Normalize vectors to length 1, also where the model does not.")
    dimensions: int | None = Field(None, ge=1, description="Truncate vectors to this dimension (Matryoshka).")
    precision: Literal["float32", "int8", "binary"] = Field(
        "float32", description="Quantize the vectors: int8 takes a quarter of the room, binary a thirty-second."
    )
    ranges: Path | None = Field(
        None, description="With int8: a file of int8 vectors to be compared with, such as documents, for its ranges."
    )
    batch_tokens: BatchTokens = None
    processes: int = Field(
        1, ge=1, description="Number of processes on this machine, or of workers on the cluster (1: one per machine)."
    )
    ray: str | None = Field(None, description="Ray cluster that encodes: auto, ray://host:10001, or local.")
    backend: Backend = "auto"
    dtype: Arithmetic = "auto"
    min_cosine: MinCosine = 0.9999
    pooling: Pooling = None
    max_length: MaxLength = 512
    device: Device = None
    trust_remote_code: TrustRemoteCode = False


class ServeOptions(Options):
    """Serve a model over HTTP, as the OpenAI embeddings API.

    Example: secateur serve smollm2-large-healed --port 8000
    """

    model: Model
    host: str = Field("127.0.0.1", description="Address to listen on; any other than loopback needs an API key.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one, which the log names.")
    name: str | None = Field(None, min_length=1, description="Model name for clients [default: the folder's name].")
    api_key_file: Annotated[Path | None, Names("file")] = Field(
        None, description="File of API keys, one per line, besides those in the variable SECATEUR_API_KEYS."
    )
    auth: bool = Field(True, description="--no-auth serves without API keys, whatever the address.")
    workers: int = Field(
        0, ge=0, description="Processes, each with the model, restarted when they crash or hang; 0: a thread encodes."
    )
    batch_tokens: BatchTokens = None
    queue_tokens: int = Field(500_000, ge=1, description="Tokens in work, beyond which requests are answered with 429.")
    max_items: int = Field(2048, ge=1, description="Maximum number of texts in a request.")
    max_tokens: int = Field(300_000, ge=1, description="Maximum number of tokens in a request.")
    max_bytes: int = Field(4 << 20, ge=1, description="Maximum size of a request's body, in bytes.")
    timeout: float = Field(60.0, gt=0, description="Seconds after which a request is answered with 503.")
    truncate: bool = Field(False, description="Truncate texts that are too long for the model; else they are refused.")
    pooling: Pooling = None
    max_length: MaxLength = 512
    backend: Backend = "auto"
    dtype: Arithmetic = "auto"
    min_cosine: MinCosine = 0.9999
    device: Device = None
    trust_remote_code: TrustRemoteCode = False
