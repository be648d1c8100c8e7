"""The server under load: many clients, batches that fail, workers that die or hang, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import openai
import pytest
from sentence_transformers import SentenceTransformer

from forked import forked_encoders as forked_encoders
from secateur.errors import SecateurError
from secateur.inference.app import make_app
from secateur.inference.encoders import Opening
from secateur.inference.monitoring import ApiError, Metrics
from secateur.inference.queueing import Batcher, LocalWorker
from secateur.inference.serve import open_worker
from secateur.inference.workers import EncoderDied, EncoderProcess
from secateur.runtime.core import Encoder, Tokens, Vectors
from servers import wait_until
from serving import (
    HEAD,
    Held,
    Running,
    holding,
    limits,
    refused,
    request,
    running,
    vectors,
)
from serving import encoder as encoder
from serving import exported as exported
from serving import folder as folder
from serving import model as model

# Under load


def waiting(server: Running) -> float:
    return server.metric("secateur_queue_tokens ")


def test_requests_of_many_clients_share_batches(encoder: Encoder, model: SentenceTransformer):
    held = Held(encoder)
    texts = [f"text number {i:02}" for i in range(40)]
    with (
        running(make_app(held, "tiny", limits())) as server,
        server.client() as client,
        ThreadPoolExecutor(40) as clients,
    ):
        one = partial(client.embeddings.create, model="tiny")
        with holding(held):
            answers = [clients.submit(one, input=text) for text in texts]
            wait_until(lambda: waiting(server) == 40 * 14)
            assert len(held.batches) == 1
        found = np.concatenate([vectors(answer.result()) for answer in answers])
        assert len(held.batches) == 2
        assert server.metric("secateur_texts_total") == 40
        assert server.metric("secateur_batch_texts_count") == 2
        assert server.metric("secateur_queue_seconds_count") == 40
    np.testing.assert_allclose(found, model.encode(texts), atol=1e-5)


def test_a_full_queue_says_when_to_come_again(encoder: Encoder):
    held = Held(encoder)
    app = make_app(held, "tiny", limits(queue_tokens=50))
    with running(app) as server, server.client(max_retries=5) as client, ThreadPoolExecutor(6) as clients:
        ask = partial(client.embeddings.create, model="tiny", input="ten tokens")
        busy = 'secateur_errors_total{code="server_busy"}'
        with holding(held):
            answers = [clients.submit(ask) for _ in range(5)]
            wait_until(lambda: waiting(server) == 50)
            with server.client() as impatient, pytest.raises(openai.RateLimitError) as error:
                impatient.embeddings.create(model="tiny", input="ten tokens")
            assert 1 <= int(error.value.response.headers["retry-after"]) <= 60
            answers.append(clients.submit(ask))  # the real client waits, and comes again
            wait_until(lambda: server.metric(busy) == 2)
        assert [len(answer.result().data) for answer in answers] == [1] * 6


def test_a_request_that_takes_too_long_leaves_the_queue(encoder: Encoder):
    held = Held(encoder)
    with running(make_app(held, "tiny", limits(timeout=0.3))) as server, holding(held):
        assert refused(503, server.post(request()))["code"] == "timeout"
        wait_until(lambda: waiting(server) == 0)


def test_who_leaves_is_not_encoded(encoder: Encoder):
    held = Held(encoder)
    body = request(input="left")
    sent = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with running(make_app(held, "tiny", limits())) as server, ThreadPoolExecutor(1) as other:
        with holding(held):
            first = other.submit(server.post, request(input="first"))
            wait_until(lambda: held.batches)
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", server.port)) as connection:
                    connection.sendall(sent)
                    wait_until(lambda: waiting(server) == len("first") + len("left"))
                wait_until(lambda: waiting(server) == len("first"))
        assert first.result()[0] == 200
        assert server.post(request(input="second"))[0] == 200
        assert server.metric('secateur_requests_total{path="/v1/embeddings",status="499"}') == 5
    assert sum(len(batch) for batch in held.batches) == 2


def test_a_batch_that_fails_fails_only_whom_it_must(encoder: Encoder, model: SentenceTransformer):
    held = Held(encoder)
    held.poison = int(model.tokenizer("?")["input_ids"][0])
    texts = ["what? " if i == 3 else f"text {i}" for i in range(8)]
    with running(make_app(held, "tiny", limits())) as server, ThreadPoolExecutor(8) as clients:
        with holding(held):
            asked = [clients.submit(server.post, request(input=text)) for text in texts]
            wait_until(lambda: waiting(server) == 8 * 6)
        answers = [answer.result() for answer in asked]
        assert [status for status, _ in answers] == [200, 200, 200, 500, 200, 200, 200, 200]
        assert refused(500, answers[3]) == {
            "message": "the model failed on these texts",
            "type": "server_error",
            "param": None,
            "code": "encoding_failed",
        }
        found = [json.loads(answer)["data"][0]["embedding"] for status, answer in answers if status == 200]
        held.failures = 1  # a failure that passes is not noticed
        assert server.post(request())[0] == 200
    others = [text for i, text in enumerate(texts) if i != 3]
    np.testing.assert_allclose(np.array(found), model.encode(others), atol=1e-5)


def test_a_batch_too_large_for_the_memory_is_halved_until_it_fits(encoder: Encoder, model: SentenceTransformer):
    held = Held(encoder)
    held.room = 24  # tokens: two texts
    texts = [f"text number {i:02}"[-10:] for i in range(32)]
    with running(make_app(held, "tiny", limits())) as server, server.client() as client:
        found = vectors(client.embeddings.create(model="tiny", input=texts))
        assert server.metric("secateur_batch_errors_total") == 0
        held.room = 5  # not even one
        assert refused(500, server.post(request(input=texts)))["code"] == "encoding_failed"
    np.testing.assert_allclose(found, model.encode(texts), atol=1e-5)


def test_a_text_has_one_vector_alone_beside_long_ones_and_a_hundred_times_at_once(
    encoder: Encoder, model: SentenceTransformer
):
    held = Held(encoder)
    texts = ["short", "a text of some thirty letters.", "long, " * 20, "tiny"]
    expected = model.encode(texts)
    with (
        running(make_app(held, "tiny", limits())) as server,
        server.client() as client,
        ThreadPoolExecutor(104) as clients,
    ):
        ask = partial(client.embeddings.create, model="tiny")
        with holding(held):
            asked = [clients.submit(ask, input=texts) for _ in range(100)]
            alone = [clients.submit(ask, input=text) for text in texts]
            wait_until(lambda: waiting(server) == 101 * sum(map(len, texts)))
        for answer in asked:
            np.testing.assert_allclose(vectors(answer.result()), expected, atol=1e-5)
        found = np.concatenate([vectors(answer.result()) for answer in alone])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert max(len(batch) * max(map(len, batch)) for batch in held.batches) <= held.batch_tokens


def test_a_server_told_to_end_finishes_what_it_took(encoder: Encoder):
    held = Held(encoder)
    held.batch_tokens = 16
    with running(make_app(held, "tiny", limits())) as server, ThreadPoolExecutor(10) as clients:
        with holding(held):
            asked = [clients.submit(server.post, request(input=f"text {i}")) for i in range(10)]
            wait_until(lambda: waiting(server) == 60)
            server.server.should_exit = True
            wait_until(lambda: refuses_connections(server.port))
        assert [answer.result()[0] for answer in asked] == [200] * 10
        server.thread.join(300)
        with pytest.raises(urllib.error.URLError):
            server.get("/health")


def refuses_connections(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) != 0


def test_a_second_signal_answers_who_waits_and_ends_at_once(encoder: Encoder, caplog):
    held = Held(encoder)
    held.batch_tokens = 16
    with running(make_app(held, "tiny", limits())) as server, ThreadPoolExecutor(4) as clients, holding(held):
        asked = [clients.submit(server.post, request(input=f"text {i}")) for i in range(4)]
        wait_until(lambda: waiting(server) == 24)
        server.server.handle_exit(signal.SIGINT, None)
        server.server.handle_exit(signal.SIGINT, None)
        assert [refused(503, answer.result())["code"] for answer in asked] == ["shutdown"] * 4
        server.thread.join(300)
        assert not server.thread.is_alive()
    assert not [record for record in caplog.records if record.exc_info or "Traceback" in record.getMessage()]


@pytest.mark.slow  # four processes start
def test_processes_that_start_at_once_leave_the_script_in_its_place():
    script, together = sys.modules["__main__"], threading.Barrier(4)

    def start() -> None:
        together.wait()
        EncoderProcess(int).close()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sys.modules["__main__"] is script


@pytest.mark.slow  # a process starts
@pytest.mark.usefixtures("forked_encoders")
def test_what_an_encoder_process_cannot_open_is_told(tmp_path: Path):
    process = EncoderProcess(partial(open_worker, Opening(str(tmp_path / "none"))))
    with contextlib.closing(process), pytest.raises(SecateurError, match="no such file or folder"):
        process.restart()
    assert not process.ready()


class Slow:
    """Takes its time on the way to the process in which it would make an encoder."""

    def __init__(self) -> None:
        self.begun = threading.Event()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        self.begun.set()
        time.sleep(0.3)
        return int, ()


@pytest.mark.slow  # two processes start
@pytest.mark.usefixtures("forked_encoders")
def test_a_process_that_is_starting_can_be_ended():
    """As when one worker of a run has died for the third time, and another for the first."""
    slow = Slow()
    process = EncoderProcess(slow)
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not process.ready() and not process._process.is_alive())
    slow.begun.clear()
    with ThreadPoolExecutor(1) as pool:
        again = pool.submit(process.restart)
        slow.begun.wait()
        process.close()
        assert isinstance(again.exception(), (EncoderDied, SecateurError))
    assert not process._process.is_alive()


@pytest.mark.slow  # six processes start, two at a time
@pytest.mark.usefixtures("forked_encoders")
def test_workers_that_hang_or_die_are_replaced_and_no_request_is_lost(
    encoder: Encoder, folder: Path, exported: Path, model: SentenceTransformer, monkeypatch, caplog
):
    monkeypatch.setattr("secateur.inference.queueing.LEAST_PATIENCE", 4.0)
    restarts: list[int] = []
    openings = [Opening(str(folder), dtype="float32", device="cpu"), Opening(str(exported))]
    workers = [EncoderProcess(partial(open_worker, one), lambda: restarts.append(1)) for one in openings]

    def send(number: int) -> None:
        for worker in workers:
            os.kill(worker.pid, number)

    send(signal.SIGSTOP)
    texts = [f"text {i:02}" for i in range(12)]
    expected = model.encode(texts)
    one_by_one = Held(encoder)
    one_by_one.batch_tokens = 16
    app = make_app(one_by_one, "tiny", limits(timeout=120), processes=workers)
    with running(app) as server, server.client(timeout=120) as client, ThreadPoolExecutor(12) as clients:

        def ask() -> list[Future]:
            return [clients.submit(client.embeddings.create, model="tiny", input=text) for text in texts]

        def check(answers: list[Future]) -> None:
            found = np.concatenate([vectors(answer.result()) for answer in answers])
            np.testing.assert_allclose(found, expected, atol=1e-5)

        assert refused(503, server.get("/ready"))["code"] == "not_ready"  # they have not loaded yet
        send(signal.SIGCONT)
        wait_until(lambda: all(worker.ready() for worker in workers))
        send(signal.SIGSTOP)
        answers = ask()
        wait_until(lambda: waiting(server) == 12 * 7)
        send(signal.SIGKILL)  # each holds a batch
        check(answers)
        assert len(restarts) == server.metric("secateur_batch_errors_total") == 2
        assert any("code -9" in str(vars(record)) for record in caplog.records)

        wait_until(lambda: all(worker.ready() for worker in workers))
        send(signal.SIGSTOP)
        answers = ask()
        wait_until(lambda: server.get("/ready")[0] == 503)
        check(answers)  # by the new ones
        wait_until(lambda: server.get("/ready")[0] == 200)
    assert len(restarts) == 4
    assert any("at work for too long" in str(vars(record)) for record in caplog.records)
    with pytest.raises(EncoderDied):
        workers[0].encode_batch(numbers(3))


class Stuck:
    """An encoder for a process: the first that is made on a machine never ends a batch that has a 7 in it."""

    def __init__(self, file: Path) -> None:
        self._first = not file.exists()
        file.touch()

    def encode_batch(self, batch: Sequence[Tokens]) -> Vectors:
        while self._first and any(7 in tokens.ids for tokens in batch):
            time.sleep(0.1)
        return np.array([[tokens.ids[0]] for tokens in batch], dtype=np.float32)


class Function(Encoder):
    """An encoder of small numbers: a function of its batches."""

    name, dimension, max_length, batch_tokens = "function", 1, 40, 200

    def __init__(self, run: Callable[[Sequence[Tokens]], Vectors] = lambda batch: np.zeros((len(batch), 1))) -> None:
        self.run = run  # type: ignore[method-assign]

    def read(self, texts: Sequence[str], prompt: str, truncate: bool) -> list[Tokens]:
        raise NotImplementedError

    def run(self, batch: Sequence[Tokens]) -> Vectors:
        raise NotImplementedError


def batcher_of(encoder: Encoder, workers: int | Sequence[EncoderProcess] = 1, **options: object) -> Batcher:
    takers = [LocalWorker(encoder)] * workers if isinstance(workers, int) else workers
    return Batcher(encoder, takers, ThreadPoolExecutor(len(takers)), limits(**options), Metrics())


@pytest.mark.slow  # two processes start
@pytest.mark.usefixtures("forked_encoders")
def test_a_batch_that_never_ends_is_repeated_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    monkeypatch.setattr("secateur.inference.queueing.LEAST_PATIENCE", 2.0)

    async def everything(process: EncoderProcess) -> None:
        batcher = batcher_of(Function(), [process])
        async with batcher.running():
            for first in (3, 7):
                found = await batcher.embed([Tokens(np.array([first], dtype=np.int32))])
                assert found.tolist() == [[first]]

    with contextlib.closing(EncoderProcess(partial(Stuck, tmp_path / "made"))) as process:
        asyncio.run(asyncio.wait_for(everything(process), 300))
    problems = [record.facts["problem"] for record in caplog.records if record.getMessage() == "batch failed"]
    assert problems
    assert all("an encoder process was at work for too long" in problem for problem in problems)


# The queue by itself


def numbers(*lengths: int, prompt: int = 0) -> list[Tokens]:
    return [Tokens(np.zeros(length, dtype=np.int32), prompt) for length in lengths]


@pytest.mark.parametrize(
    ("texts", "budget", "lengths"),
    [
        (numbers(20, 100, 17, 3, 24, 22), 72, [20, 17, 24]),
        (numbers(20, 100, 17, 3, 24, 16, 22), 1000, [20, 17, 24, 16, 22]),
        (numbers(*[120] * 9, 100), 2000, [*[120] * 9, 100]),
        (numbers(200, 3), 96, [200]),
        ([*numbers(5), *numbers(5, prompt=2), *numbers(6)], 96, [5, 6]),
    ],
)
def test_a_batch_is_the_first_text_and_others_of_about_its_length(texts: list[Tokens], budget: int, lengths: list[int]):
    batches: list[Sequence[Tokens]] = []
    encoder = Function(lambda batch: batches.append(batch) or np.zeros((len(batch), 1)))
    encoder.batch_tokens, encoder.max_length = budget, 256

    async def everything() -> None:
        batcher = batcher_of(encoder)
        asked = [asyncio.ensure_future(batcher.embed([text])) for text in texts]
        await asyncio.sleep(0)
        async with batcher.running():
            await asyncio.gather(*asked)

    asyncio.run(everything())
    assert sorted(map(len, batches[0])) == sorted(lengths)


def test_every_text_gets_its_own_vector_whatever_fails_or_leaves():
    rng = np.random.default_rng(0)

    def encode(batch: Sequence[Tokens]) -> Vectors:
        if rng.random() < 0.1:
            raise RuntimeError
        return np.array([[tokens.ids[0], len(tokens)] for tokens in batch], dtype=np.float32)

    async def ask(batcher: Batcher, number: int) -> bool:
        texts = [Tokens(np.full(1 + (number * 7 + i) % 40, number * 10 + i, dtype=np.int32)) for i in range(number % 4)]
        texts = texts or numbers(3)
        asked = asyncio.ensure_future(batcher.embed(texts))
        if number % 10 == 7:
            await asyncio.sleep(0)
            asked.cancel()
        try:
            found = await asked
        except asyncio.CancelledError:
            return True
        except ApiError:
            return False
        assert found.tolist() == [[text.ids[0], len(text)] for text in texts]
        return True

    async def everything() -> list[bool]:
        encoder = Function(encode)
        encoder.dimension = 2
        batcher = batcher_of(encoder, workers=2, queue_tokens=10**6)
        async with batcher.running():
            outcomes = await asyncio.gather(*(ask(batcher, number) for number in range(1000)))
            assert batcher.ready
        return outcomes

    assert sum(asyncio.run(everything())) >= 950


def test_a_queue_takes_one_request_of_any_size_and_then_only_what_fits():
    async def everything() -> None:
        batcher = batcher_of(Function(), queue_tokens=10)
        first = asyncio.ensure_future(batcher.embed(numbers(20)))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="busy"):
            await batcher.embed(numbers(1))
        async with batcher.running():
            await first
            await batcher.embed(numbers(1))

    asyncio.run(everything())
