"""The bodies of the OpenAI embeddings API: JSON to tokens, and vectors to JSON, piece by piece."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import from_json

from secateur.inference.gate import ApiError, Limits
from secateur.runtime.core import Encoder, TextRefused, Tokens, Vectors

PIECE_NUMBERS = 1 << 15
"""Numbers of vectors that are written as JSON at once."""


def _kind(value: Any) -> str:
    """Which form of ``input`` a value means to be, by its first part."""
    if isinstance(value, str):
        return "text"
    first = value[0] if isinstance(value, list) and value else ""
    return "ids" if isinstance(first, int | float) else "id_lists" if isinstance(first, list) else "texts"


def _whole(value: Any) -> Any:
    """15.0 as 15, also in a list: to JSON they are the same."""
    if isinstance(value, list):
        return [_whole(number) if type(number) is float else number for number in value]
    return int(value) if type(value) is float and value.is_integer() else value


TokenId = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True), BeforeValidator(_whole)]
_INPUT = "A text, several texts, token ids of one text, or those of several. Ids go to the model as they are."
_DIMENSIONS = "Keep this many numbers of each vector, and make it one long again; for models trained for it."


class EmbeddingRequest(BaseModel):
    """The body of ``POST /v1/embeddings``: OpenAI's, and ``prompt``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    input: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("texts")]
        | Annotated[Ids, Tag("ids")]
        | Annotated[list[Ids], Field(min_length=1, fail_fast=True), Tag("id_lists")],
        Discriminator(_kind),
    ] = Field(description=_INPUT)
    dimensions: Annotated[int | None, BeforeValidator(_whole)] = Field(None, ge=1, description=_DIMENSIONS)
    encoding_format: Literal["float", "base64"] | None = "float"
    prompt: str | None = Field(None, description="Name of the model's prompt that goes before each text.")
    user: Any = Field(None, description="Ignored.")


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "secateur"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


def request_schema(encoder: Encoder, name: str, limits: Limits) -> dict[str, Any]:
    """The JSON schema of a request to this very model: its name, lengths, prompts and dimensions."""
    schema = EmbeddingRequest.model_json_schema()
    fields = schema["properties"]
    fields["model"] = {"type": "string", "enum": [name]}
    fields["dimensions"]["anyOf"][0]["maximum"] = encoder.dimension
    if encoder.prompts:
        fields["prompt"]["anyOf"][0]["enum"] = sorted(encoder.prompts)
    else:
        fields["prompt"]["anyOf"] = [{"type": "null"}]
    ids = {"type": "integer", "minimum": 0, "maximum": encoder.vocabulary - 1}
    ids = {"type": "array", "items": ids, "minItems": 1, "maxItems": encoder.max_length}
    texts = {"type": "array", "items": {"type": "string", "minLength": 1}}
    several = {"minItems": 1, "maxItems": limits.max_items}
    lists = {"type": "array", "items": ids}
    text_forms = [{"type": "string", "minLength": 1}, texts | several]
    fields["input"]["oneOf"] = [*text_forms, ids, lists | several]
    prompted = {"properties": {"input": {"oneOf": text_forms}}}
    schema["anyOf"] = [prompted, {"properties": {"prompt": {"type": "null"}}}]
    return schema


def parse(body: bytes, max_items: int) -> EmbeddingRequest:
    """The request in a body, with at most ``max_items`` texts.

    Raises:
        ApiError: 400: it is no JSON, or not this request; nothing of the body is in the message but the field.
    """
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    # Before pydantic sees them: it would make an error of each of a million keys.
    unknown = next((key for key in content if key not in EmbeddingRequest.model_fields), None)
    if unknown is not None:
        known = ", ".join(EmbeddingRequest.model_fields)
        raise ApiError(400, f"no such field; known are {known}", param=unknown[:64], code="unknown_field")
    if "input" in content:
        _check_form(content["input"], max_items)
    try:
        return EmbeddingRequest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        tags = ("text", "texts", "ids", "id_lists")
        name, *places = [part for part in first["loc"] if part not in tags]
        param = str(name) + "".join(f"[{place}]" for place in places)
        raise ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value") from None


def _check_form(given: Any, max_items: int) -> None:
    """What can be told of ``input`` at a glance; pydantic would look at each of a million texts first."""
    if not isinstance(given, str | list):
        problem = "input: a text, a list of texts, a list of token ids, or a list of such lists"
        raise ApiError(400, problem, param="input", code="invalid_value")
    if isinstance(given, list) and _kind(given) != "ids" and len(given) > max_items:
        problem = f"input: {len(given)} texts in one request, at most {max_items}"
        raise ApiError(400, problem, param="input", code="too_many_texts")


@dataclass(frozen=True)
class Prepared:
    """A request, ready for the model."""

    texts: list[Tokens]
    dimensions: int | None
    as_base64: bool


def prepare(body: bytes, encoder: Encoder, name: str, limits: Limits) -> Prepared:
    """A body as tokens; run in one thread, so that no two are taken apart at once.

    Raises:
        ApiError: The request is not one that this model can answer.
    """
    request = parse(body, limits.max_items)
    if request.model != name:
        raise ApiError(404, f"no such model; this server has {name}", param="model", code="model_not_found")
    if request.dimensions is not None and request.dimensions > encoder.dimension:
        problem = f"dimensions: the model's vectors have {encoder.dimension} numbers, so at most {encoder.dimension}"
        raise ApiError(400, problem, param="dimensions", code="invalid_value")
    several = request.input if isinstance(request.input, list) and not isinstance(request.input[0], int) else None
    inputs: list[Any] = [request.input] if several is None else list(several)
    try:
        texts = _tokens(inputs, request.prompt, encoder, limits)
    except TextRefused as error:
        param = "input" if error.place is None or several is None else f"input[{error.place}]"
        raise ApiError(400, f"{param}: {error}", param=param, code="text_refused") from None
    return Prepared(texts, request.dimensions, request.encoding_format == "base64")


def _tokens(inputs: list[Any], prompt: str | None, encoder: Encoder, limits: Limits) -> list[Tokens]:
    if prompt is not None and prompt not in encoder.prompts:
        known = ", ".join(sorted(encoder.prompts)) or "none"
        raise ApiError(
            400, f"prompt: the model has no such prompt; it has {known}", param="prompt", code="invalid_value"
        )
    if isinstance(inputs[0], str):
        name = prompt if prompt is not None else encoder.default_prompt
        before = encoder.prompts[name] if name else ""
        return encoder.tokenize(inputs, before, truncate=limits.truncate, limit=limits.max_tokens)
    if prompt is not None:
        raise ApiError(400, "prompt: goes before texts, not before token ids", param="prompt", code="invalid_value")
    return _given_tokens(inputs, encoder, limits)


def _given_tokens(inputs: list[list[int]], encoder: Encoder, limits: Limits) -> list[Tokens]:
    """Token ids that a client made itself: checked, and cut where texts would be."""
    texts = []
    for place, ids in enumerate(inputs):
        if max(ids) >= encoder.vocabulary:
            raise TextRefused(place, "a token id that the model does not have", f"ids are below {encoder.vocabulary}")
        if len(ids) > encoder.max_length and not limits.truncate:
            raise TextRefused(place, f"{len(ids)} tokens are too many", f"the model reads at most {encoder.max_length}")
        kept = ids[: encoder.max_length] if encoder.truncation_side == "right" else ids[-encoder.max_length :]
        texts.append(Tokens(np.asarray(kept, dtype=np.int32)))
    if sum(map(len, texts)) > limits.max_tokens:
        raise TextRefused(None, f"more than {limits.max_tokens} tokens in one request", "send fewer texts at once")
    return texts


def shorten(vectors: Vectors, dimensions: int | None) -> Vectors:
    """The first ``dimensions`` numbers of vectors, of length one again; None leaves them as they are."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    short = vectors[:, :dimensions]
    norms = np.maximum(np.linalg.norm(short, axis=1, keepdims=True), 1e-12)
    return np.asarray(short / norms, dtype=np.float32)


def _body(vectors: Vectors, name: str, tokens: int, as_base64: bool) -> Iterator[bytes]:
    """The answer as JSON, in pieces of about ``PIECE_NUMBERS`` numbers."""
    yield b'{"object":"list","model":%s,"data":[' % json.dumps(name).encode()
    rows = max(1, PIECE_NUMBERS // vectors.shape[1])
    for start in range(0, len(vectors), rows):
        piece = [_embedding(i, vectors[i], as_base64) for i in range(start, min(start + rows, len(vectors)))]
        yield (b"," if start else b"") + ",".join(piece).encode()
    yield b'],"usage":%s}' % json.dumps({"prompt_tokens": tokens, "total_tokens": tokens}).encode()


def _embedding(index: int, vector: Vectors, as_base64: bool) -> str:
    written = (
        f'"{base64.b64encode(vector.astype("<f4").tobytes()).decode()}"' if as_base64 else json.dumps(vector.tolist())
    )
    return f'{{"object":"embedding","index":{index},"embedding":{written}}}'


def respond(vectors: Vectors, name: str, tokens: int, as_base64: bool) -> Response:
    """The answer with these vectors; a long one is sent in pieces."""
    pieces = _body(vectors, name, tokens, as_base64)
    if vectors.size <= PIECE_NUMBERS:
        return Response(b"".join(pieces), media_type="application/json")

    async def one_by_one() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
            await asyncio.sleep(0)  # others get their turn

    return StreamingResponse(one_by_one(), media_type="application/json")
