"""The server as one client meets it: the real ``openai`` client and raw sockets, over a real uvicorn server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import openai
import pytest
from sentence_transformers import SentenceTransformer

import secateur
from forked import run, start
from secateur.errors import ConfigError, ModelError, SecateurError
from secateur.inference.app import make_app
from secateur.inference.encoders import ModelEncoder
from secateur.inference.monitoring import JsonLines
from secateur.inference.serve import API_KEYS, bind, read_keys
from secateur.measures.metrics import paired_cosines
from secateur.options import ServeOptions, make
from secateur.runtime.core import Encoder
from servers import wait_until
from serving import (
    HEAD,
    TEXTS,
    Held,
    Running,
    fetch,
    limits,
    raw,
    refused,
    request,
    running,
    vectors,
    worker_of,
)
from serving import encoder as encoder
from serving import exported as exported
from serving import folder as folder
from serving import model as model
from serving import served as served

# What clients get


def test_vectors_are_those_of_the_model_itself(served: Running, model: SentenceTransformer):
    expected = model.encode(TEXTS)
    with served.client() as client:
        for form in ("float", "base64"):
            answer = client.embeddings.create(model="tiny", input=TEXTS, encoding_format=form)
            if form == "base64":
                raw = [base64.b64decode(row.embedding) for row in answer.data]
                found = np.array([np.frombuffer(row, dtype="<f4") for row in raw])
            else:
                found = vectors(answer)
            assert [row.index for row in answer.data] == list(range(len(TEXTS)))
            np.testing.assert_allclose(found, expected, atol=1e-5)
        by_default = client.embeddings.create(model="tiny", input="one")  # base64 on the way, unpacked by the client
        np.testing.assert_allclose(vectors(by_default), expected[:1], atol=1e-5)
        tokens = sum(len(model.tokenizer(text)["input_ids"]) for text in TEXTS)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens
        assert answer.model == "tiny"


def test_token_ids_are_taken_as_they_are(served: Running, model: SentenceTransformer):
    ids = [model.tokenizer(text)["input_ids"] for text in TEXTS]
    with served.client() as client:
        several = vectors(client.embeddings.create(model="tiny", input=ids))
        one = vectors(client.embeddings.create(model="tiny", input=ids[1]))
    np.testing.assert_allclose(several, model.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(one[0], several[1], atol=1e-5)


def test_dimensions_cut_and_make_one_long(served: Running, model: SentenceTransformer):
    with served.client() as client:
        found = vectors(client.embeddings.create(model="tiny", input=TEXTS, dimensions=8))
        with pytest.raises(openai.BadRequestError, match="less than or equal to 32") as error:
            client.embeddings.create(model="tiny", input="one", dimensions=33)
    assert error.value.param == "dimensions"
    expected = model.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_prompts_by_name(served: Running, model: SentenceTransformer):
    def found(**extra: str) -> np.ndarray:
        with served.client() as client:
            return vectors(client.embeddings.create(model="tiny", input=TEXTS, extra_body=extra))

    expected = model.encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(found(prompt="query"), expected, atol=1e-5)
    np.testing.assert_allclose(found(prompt="document"), model.encode(TEXTS), atol=1e-5)
    assert np.abs(expected - model.encode(TEXTS)).max() > 0.01
    with pytest.raises(openai.BadRequestError, match="'document' or 'query'"):
        found(prompt="passage")
    assert refused(400, served.post(request(prompt="query", input=[5])))["param"] == "prompt"


def test_a_model_without_prompts_takes_none(encoder: Encoder):
    plain = Held(encoder)
    plain.prompts, plain.default_prompt = {}, None
    with running(make_app(plain, "tiny", limits())) as server:
        assert refused(400, server.post(request(prompt="query")))["param"] == "prompt"
        assert server.post(request(prompt=None))[0] == 200


def test_a_model_that_cuts_no_text_is_served(folder: Path):
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 10**30  # as a tokenizer says that knows no limit
    with running(make_app(ModelEncoder(model), "tiny", limits())) as server:
        assert server.post(request())[0] == server.post(request(input=[5, 6]))[0] == 200


def test_the_models_own_default_prompt_is_kept(folder: Path):
    model = SentenceTransformer(str(folder), device="cpu", default_prompt_name="query")
    with running(make_app(ModelEncoder(model), "tiny", limits())) as server, server.client() as client:
        found = vectors(client.embeddings.create(model="tiny", input=TEXTS))
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-5)


def test_the_model_is_listed_and_another_is_not_served(served: Running):
    with served.client() as client:
        assert [card.id for card in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").object == "model"
        with pytest.raises(openai.NotFoundError, match="this server has tiny"):
            client.embeddings.create(model="ada", input="one")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("some/ada")


def test_long_answers_come_whole(encoder: Encoder, model: SentenceTransformer):
    texts = [f"text {i}" for i in range(2000)]
    with running(make_app(encoder, "tiny", limits())) as server, server.client() as client:
        answer = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    np.testing.assert_allclose(vectors(answer), model.encode(texts), atol=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"input": ""}, "input", "at least 1 character"),
        ({"input": ["one", ""]}, "input[1]", "at least 1 character"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [[]]}, "input[0]", "at least 1 item"),
        ({"input": [1, "one"]}, "input[1]", "valid integer"),
        ({"input": [True]}, "input[0]", "valid integer"),
        ({"input": {"text": "one"}}, "input", "valid array"),
        ({"input": None}, "input", "valid array"),
        ({"input": 1}, "input", "valid array"),
        ({"input": [-1]}, "input[0]", "greater than or equal to 0"),
        ({"input": [[5], [10**30]]}, "input[1][0]", "less than 45"),
        ({"input": ["one", "x" * 129]}, "input[1]", "129 tokens are too many: the model reads at most 128"),
        ({"input": "x" * 10_000}, "input", "at least 8192 tokens are too many"),
        ({"input": [[5] * 129]}, "input[0]", "at most 128 items"),
        ({"input": ["a"] * 65}, "input", "at most 64 items"),
        ({"input": ["a" * 100] * 30}, "input", "more than 2000 tokens in one request"),
        ({"input": [[5] * 100] * 30}, "input", "more than 2000 tokens in one request"),
        ({"dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"dimensions": 8.5}, "dimensions", "valid integer"),
        ({"encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input_type": "query"}, "input_type", "known are model, input, dimensions"),
        ({"model": 3}, "model", "valid string"),
    ],
)
def test_a_refusal_names_the_field_and_the_limit(served: Running, fields: dict, param: str, said: str):
    error = refused(400, served.post(request(**fields)))
    assert error["param"] == param
    assert said in error["message"]


def test_what_means_the_default_or_nothing_is_taken(served: Running):
    expected = served.post(request())
    assert expected[0] == 200
    assert served.post(request(encoding_format=None, dimensions=None, prompt=None, user=1)) == expected


def test_texts_are_cut_only_where_the_server_was_told_to(encoder: Encoder, model: SentenceTransformer):
    texts = ["word, " * 100, "word, " * 5000]
    with running(make_app(encoder, "tiny", limits(truncate=True))) as server, server.client() as client:
        answer = client.embeddings.create(model="tiny", input=texts)
    np.testing.assert_allclose(vectors(answer), model.encode(texts), atol=1e-5)
    assert answer.usage.prompt_tokens == 256


@pytest.mark.parametrize("kind", ["folder", "exported"])
def test_very_long_texts_are_cut_on_the_models_own_side(
    request: pytest.FixtureRequest, folder: Path, tmp_path: Path, kind: str
):
    copied = shutil.copytree(request.getfixturevalue(kind), tmp_path / "left")
    settings = copied / ("export.json" if kind == "exported" else "tokenizer_config.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"truncation_side": "left"}))
    model = SentenceTransformer(str(folder), device="cpu")
    model.tokenizer.truncation_side = "left"
    texts = ["word, " * 5000 + "and the end", "word, " * 100 + "x", " " * 20_000 + "end"]
    expected = model.encode(texts)
    ids = [model.tokenizer(text, truncation=False)["input_ids"] for text in texts]
    encoder = worker_of(copied).encoder
    with running(make_app(encoder, "tiny", limits(truncate=True))) as server, server.client() as client:
        for given in (texts, ids):
            found = vectors(client.embeddings.create(model="tiny", input=given))
            np.testing.assert_allclose(found, expected, atol=1e-5)


HOSTILE = {
    "nothing": (b"", 400),
    "no JSON": (b"{", 400),
    "no object": (b'["model"]', 400),
    "not UTF-8": (b'{"model": "tiny", "input": "\xff\xfe"}', 400),
    "half a surrogate": (b'{"model": "tiny", "input": "\\ud800"}', 400),
    "UTF-16": (request().decode().encode("utf-16"), 400),
    "deep lists": (b'{"model": "tiny", "input": ' + b"[" * 45_000 + b"]" * 45_000 + b"}", 400),
    "deep objects": (b'{"a":' * 15_000 + b"1" + b"}" * 15_000, 400),
    "no number": (b'{"model": "tiny", "input": [NaN]}', 400),
    "infinite": (b'{"model": "tiny", "input": "one", "dimensions": 1e999}', 400),
    "a huge number": (b'{"model": "tiny", "input": "one", "dimensions": ' + b"9" * 90_000 + b"}", 400),
    "many keys": (b"{" + b",".join(b'"%d":1' % i for i in range(9000)) + b"}", 400),
    "many empty lists": (b'{"model": "tiny", "input": [' + b"[]," * 30_000 + b"[]]}", 400),
    "many wrong types": (b'{"model": "tiny", "input": ["a"' + b",1" * 40_000 + b"]}", 400),
    "a key that is long": (b'{"' + b"k" * 90_000 + b'": 1}', 400),
    "too large": (request(input="x" * 100_000), 413),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_refused_and_the_server_goes_on(served: Running, name: str):
    body, status = HOSTILE[name]
    error = refused(status, served.post(body))
    assert len(error["message"]) < 500
    assert served.post(request())[0] == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x00\xff\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: x\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n{", b"4"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 7, b"413"),
        (HEAD + b"Authorization: Bearer \xff\xfe\r\nContent-Length: 2\r\n\r\n{}", b"400"),
        (b"GET /%ff%fe HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"404"),
        (b"BREW /v1/embeddings HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"405"),
    ],
)
def test_hostile_bytes_get_a_4xx(served: Running, sent: bytes, status: bytes):
    assert raw(served.port, sent).startswith(b"HTTP/1.1 " + status)
    assert served.get("/ready")[0] == 200


def test_other_paths_methods_and_types_are_errors_in_the_same_shape(served: Running):
    assert refused(404, served.get("/v1/chat"))["type"] == "invalid_request_error"
    assert "/v1/embeddings" in refused(404, served.get("/v1/embeddings/"))["message"]
    wrong = refused(405, served.get("/v1/embeddings"))
    assert (wrong["code"], wrong["message"]) == ("method_not_allowed", "this path takes POST")
    refused(415, served.post(request(), **{"Content-Type": "text/plain"}))
    assert "Content-Encoding" in refused(415, served.post(request(), **{"Content-Encoding": "gzip"}))["message"]
    assert served.post(request(), **{"Content-Encoding": "identity"})[0] == 200
    assert served.metric('secateur_errors_total{code="method_not_allowed"}') >= 1
    assert served.metric('secateur_errors_total{code="not_found"}') >= 2
    assert served.metric('secateur_requests_total{path="/v1/embeddings",status="405"}') >= 1
    assert served.metric('secateur_requests_total{path="other",status="404"}') >= 2


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_health_can_be_asked_for_without_a_body(served: Running, path: str):
    assert fetch(urllib.request.Request(served.address + path, method="HEAD")) == (200, "")


def test_bodies_in_memory_are_bounded_together(encoder: Encoder):
    with running(make_app(encoder, "tiny", limits(max_bytes=1000))) as server, contextlib.ExitStack() as held:
        for _ in range(8):  # each holds a body but for its last byte
            connection = held.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + b" " * 990)
        wait_until(lambda: server.post(request(input="x" * 100))[0] == 429)
        held.close()
        wait_until(lambda: server.post(request(input="x" * 100))[0] == 200)


def test_a_body_that_trickles_is_cut_off(encoder: Encoder):
    with running(make_app(encoder, "tiny", limits(timeout=0.3))) as server:
        answer = raw(server.port, HEAD + b"Content-Length: 1000\r\n\r\n{")
        head, _, body = answer.decode().partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 408")
        assert refused(408, (408, body))["message"] == "the body came too slowly"
        assert server.post(request())[0] == 200


def test_schemathesis_finds_nothing_against_the_servers_own_schema(served: Running, tmp_path: Path):
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{served.address}/openapi.json"]
    options = ["--max-examples", "15", "--seed", "1", "--no-color"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)  # it keeps a cache there
    assert done.returncode == 0, done.stdout
    assert "6 selected / 6 total" in done.stdout
    assert served.get("/ready")[0] == 200


# Keys


def test_keys(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    (tmp_path / "keys").write_text("from-file\n\nanother\n")
    monkeypatch.setenv(API_KEYS, "from-environment, ")
    caplog.set_level(logging.DEBUG)
    with running(make_app(encoder, "tiny", limits(), keys=read_keys(tmp_path / "keys"))) as server:
        for key in ("from-file", "another", "from-environment"):
            with server.client(api_key=key) as client:
                assert len(client.embeddings.create(model="tiny", input="one").data) == 1
        for key in ("from-fil", "from-file2", "ключ".encode().decode("latin-1"), "from-environment,"):
            refused(401, server.post(request(), Authorization=f"Bearer {key}"))
        refused(401, server.post(b"x" * 10_000_000))
        refused(401, server.post(request(), Authorization="Basic from-file"))
        assert [server.get(path)[0] for path in ("/metrics", "/v1/models", "/health", "/ready")] == [401, 401, 200, 200]
    assert "from-" not in caplog.text


def test_what_is_no_key_is_refused_and_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbffirst\r\n\n second \n")
    assert read_keys(file) == [b"first", b"second"]
    file.write_text("first\n# of Anna\n")
    with pytest.raises(ConfigError, match="line 2: a key has no blanks") as error:
        read_keys(file)
    assert "Anna" not in str(error.value)
    for wrong in ("first\nsecond", "first,sec ond"):
        monkeypatch.setenv(API_KEYS, wrong)
        with pytest.raises(ConfigError, match="separated by commas"):
            read_keys(None)


def test_other_machines_are_served_only_with_a_key_or_when_told_so(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 is reachable from other machines.*--no-auth"):
        bind("0.0.0.0", 0)
    with pytest.raises(ConfigError, match="reachable"):
        bind("::", 0)
    bind("0.0.0.0", 0, auth=False).close()
    bind("0.0.0.0", 0, [b"key"]).close()
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match=r"cannot listen at 127\.0\.0\.1"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match=r"cannot listen at a\.\.b, port 0"):
        bind("a..b", 0, auth=False)
    if socket.has_ipv6:
        with contextlib.suppress(ConfigError):
            bind("::1", 0).close()
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_keys(tmp_path / "empty")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "none")


# The process, its log, its options


@pytest.mark.parametrize(
    ("workers", "backend"), [("0", "torch"), pytest.param("1", "openvino", marks=pytest.mark.slow)]
)
def test_the_command_serves_logs_json_without_texts_and_ends_well(
    folder: Path, model: SentenceTransformer, tmp_path: Path, workers: str, backend: str
):
    if backend != "torch":
        pytest.importorskip(backend)
    log = tmp_path / "log"
    secret = "a text that nobody should read"
    words = ["serve", str(folder), "--port", "0", "--device", "cpu", "--workers", workers, "--backend", backend]
    home = tmp_path / "home"
    home.mkdir()
    environment = {API_KEYS: "sesame-open", "HOME": str(home), "CI": ""}
    process = start(words, tmp_path / "out", log, environment=environment)
    try:
        wait_until(lambda: '"serving"' in log.read_text() or not process.is_alive())
        first = json.loads(log.read_text().splitlines()[1])
        address = f"{first['address']}/v1"
        with openai.OpenAI(base_url=address, api_key="sesame-open", max_retries=9) as client:
            answer = client.embeddings.with_raw_response.create(model="tiny", input=[secret, "two"])
            with pytest.raises(openai.BadRequestError):
                client.embeddings.create(model="tiny", input=secret * 100)
        process.terminate()
        process.join(300)
        assert process.exitcode == 0
    finally:
        process.kill()
    assert first["backend"] == backend
    assert first["told"].startswith(f"{backend} ")
    expected = model.encode([secret, "two"])
    given = np.array([row.embedding for row in answer.parse().data])
    assert paired_cosines(given, expected).min() >= 0.9999
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["starting", "serving", "request", "request", "ended"]
    told = lines[2]
    assert told["request"] == answer.headers["x-request-id"]
    assert (told["path"], told["status"], told["texts"], told["tokens"]) == ("/v1/embeddings", 200, 2, len(secret) + 3)
    assert lines[3]["error"] == "text_refused"
    assert secret not in log.read_text()
    assert "sesame" not in log.read_text()
    assert not (home / "intel").exists()  # where OpenVINO and NNCF keep the id under which they report their use


def test_ctrl_c_does_not_wait_for_the_conversion_of_a_first_start(folder: Path, tmp_path: Path):
    pytest.importorskip("openvino")
    model = shutil.copytree(folder, tmp_path / "tiny", ignore=shutil.ignore_patterns("conversions"))
    command = ("serve", model, "--port", "0", "--device", "cpu", "--backend", "openvino")
    done = run(*command, watch=(signal.SIGINT, model, "conversions/*.partial"))
    assert done.returncode == 130
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == ["starting", "ended"]
    assert not [item for item in (model / "conversions").iterdir() if item.suffix != ".partial"]


def test_a_traceback_in_the_log_says_where_but_not_what():
    try:
        raise ValueError("a text")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, __file__, 1, "bug", None, sys.exc_info())
    line = JsonLines().format(record)
    assert json.loads(line)["error"] == "ValueError"
    assert "test_serve.py:" in line
    assert "a text" not in line


def test_a_model_that_gives_other_vectors_in_batches_is_not_served(folder: Path):
    model = secateur.open_model(folder, device="cpu")
    model[1].register_forward_pre_hook(
        lambda _, features: (
            (features[0] | {"token_embeddings": features[0]["token_embeddings"].roll(1, 2)},)
            if features[0]["input_ids"].shape[1] % 8 == 0
            else None
        )
    )
    with pytest.raises(ModelError, match="gives other vectors in batches"):
        ModelEncoder(model, "tiny")


def test_an_export_is_served_like_its_model(exported: Path, model: SentenceTransformer):
    encoder = worker_of(exported).encoder
    with running(make_app(encoder, "tiny", limits())) as server:
        client = server.client()
        given = client.embeddings.create(model="tiny", input=[text for text in TEXTS if text.strip()])
        instructed = client.embeddings.create(model="tiny", input="one", extra_body={"prompt": "query"})
        refused = server.post(json.dumps({"model": "tiny", "input": "word " * 5000}).encode())
    expected = model.encode([text for text in TEXTS if text.strip()])
    assert np.array([row.embedding for row in given.data]) == pytest.approx(expected, abs=1e-5)
    assert np.array(instructed.data[0].embedding) == pytest.approx(model.encode("one", prompt_name="query"), abs=1e-5)
    assert refused[0] == 400
    assert "too many" in refused[1]


def test_the_server_and_bulk_encoding_do_not_import_each_other():
    server, bulk = ("monitoring", "queueing", "app", "serve"), ("vector_files", "encode")
    package = Path(secateur.__file__).parent / "inference"
    for some, others in ((server, bulk), (bulk, server)):
        for module in some:
            source = (package / f"{module}.py").read_text()
            assert not [other for other in others if f"secateur.inference.{other} import" in source], module


def test_options_that_cannot_be_are_refused_before_anything_is_opened(folder: Path, tmp_path: Path):
    for workers in (0, 1):
        with pytest.raises(ConfigError, match="no device of torch"):
            secateur.serve(folder, device="nonsense", workers=workers)
    with pytest.raises(ConfigError, match="leave one of them out"):
        secateur.serve(folder, auth=False, api_key_file=tmp_path / "keys")
    with pytest.raises(ConfigError, match="timeout"):
        make(ServeOptions, {"model": str(folder), "timeout": "inf"})


def test_a_notebook_is_told_to_start_a_thread(folder: Path):
    async def cell() -> None:
        secateur.serve(folder, port=0)

    with pytest.raises(SecateurError, match=r"event loop.* in a thread"):
        asyncio.run(cell())
