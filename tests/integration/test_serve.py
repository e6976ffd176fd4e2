"""compress serve, asked by the official openai client: both engines, every depth, streams, errors, ends."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from compress.core.errors import UserError
from compress.runtime.serve.server import listen
from compress.runtime.serve.worker import AnswerJob, Stopping, Worker
from compress.runtime.session import Piece, Pieces, Session, Settings
from compress.runtime.text import StopTexts

TALK: Any = [{"role": "system", "content": "the way"}, {"role": "user", "content": "what would you say, été 42?"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 12}


class Served:
    """A server process and a client of it."""

    def __init__(self, bundle: Path, *options: str):
        command = [sys.executable, "-m", "compress", "serve", str(bundle), "--port", "0", "--threads", "1", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert " at http://" in self.line, self.process.communicate()[1]
        self.url = self.line.split(" at ")[1].split(";")[0]
        self.client = openai.OpenAI(base_url=self.url, api_key="secret", max_retries=0, timeout=60)

    def end(self) -> tuple[int, str]:
        """(exit code, standard error) after Ctrl-C."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        _, err = self.process.communicate(timeout=30)
        return self.process.returncode, err

    def raw(self, method: str, path: str, body: str = "", **headers: str) -> tuple[int, dict[str, Any]]:
        port = int(self.url.rsplit(":", 1)[1].removesuffix("/v1"))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        found = answer.status, json.load(answer)
        connection.close()
        return found


@pytest.fixture(scope="module", params=["onnx", "llama.cpp"])
def served(request, bundle) -> Iterator[Served]:
    server = Served(bundle, "--engine", request.param, "--context", "512")
    server.engine = request.param  # type: ignore[attr-defined]
    yield server
    code, err = server.end()
    assert (code, err) == (0, "stopped\n")


@pytest.fixture
def expected(served, bundle) -> Callable[..., list[Piece]]:
    """What the session itself writes."""

    def expected(prompt: Any, **settings: Any) -> list[Piece]:
        with Session(bundle, served.engine, threads=1, context=512) as session:
            begin = session.complete if isinstance(prompt, str) else session.chat
            return list(begin(prompt, Settings(**settings)))

    return expected


def joined(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_models_are_the_depths(served):
    assert [model.id for model in served.client.models.list()] == ["tiny", "tiny@2", "tiny@3", "tiny@4"]
    assert served.client.models.retrieve("tiny@3").owned_by == "compress"


@pytest.mark.parametrize(("model", "depth"), [("tiny", 4), ("tiny@2", 2), ("tiny@3", 3)])
def test_chat_at_every_depth(served, expected, model, depth):
    found = served.client.chat.completions.create(model=model, messages=TALK, **GREEDY)
    pieces = expected(TALK, max_tokens=12, depth=depth)
    usage = pieces[-1].usage
    assert usage is not None
    assert found.object == "chat.completion" and found.model == model
    assert found.choices[0].message.content == joined(pieces) and found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == pieces[-1].finish
    assert found.usage.prompt_tokens == usage.prompt_tokens
    assert found.usage.completion_tokens == usage.completion_tokens == found.usage.total_tokens - usage.prompt_tokens


def test_streams_are_the_same_text_in_pieces(served, expected):
    stream = served.client.chat.completions.create(
        model="tiny@3", messages=TALK, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    pieces = expected(TALK, max_tokens=12, depth=3)
    said = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(said) > 3 and "".join(said) == joined(pieces)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == pieces[-1].finish
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == pieces[-1].usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1 and all(chunk.usage is None for chunk in chunks[:-1])


def test_plain_completions(served, expected):
    found = served.client.completions.create(model="tiny", prompt="the way of", **GREEDY)
    wanted = joined(expected("the way of", max_tokens=12))
    assert found.choices[0].text == wanted and found.object == "text_completion"
    stream = served.client.completions.create(model="tiny", prompt=["the way of"], stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream) == wanted
    short = served.client.completions.create(model="tiny", prompt="the way of", temperature=0)
    assert short.usage.completion_tokens <= 16


def test_stop_texts_end_an_answer_before_them(served, expected):
    whole = joined(expected(TALK, max_tokens=12))
    stop = whole[4:6]
    for texts in (stop, ["never there", stop]):
        found = served.client.chat.completions.create(model="tiny", messages=TALK, stop=texts, **GREEDY)
        assert found.choices[0].message.content == whole[: whole.index(stop)]
        assert found.choices[0].finish_reason == "stop" and found.usage.completion_tokens < 12


def test_draws_follow_the_seed_and_differ_without(served, expected):
    def draw(**settings: Any) -> str:
        return served.client.completions.create(model="tiny", prompt="the", max_tokens=8, **settings).choices[0].text

    assert draw(seed=5, temperature=1.5) == draw(seed=5, temperature=1.5)
    assert draw(seed=5, temperature=1.5) == joined(expected("the", max_tokens=8, seed=5, temperature=1.5))
    assert draw(seed=5, temperature=1.5, top_p=1e-6) == joined(expected("the", max_tokens=8))
    assert len({draw() for _ in range(4)}) > 1


def test_max_completion_tokens(served):
    found = served.client.chat.completions.create(model="tiny", messages=TALK, max_completion_tokens=2, temperature=0)
    assert found.usage.completion_tokens == 2 and found.choices[0].finish_reason == "length"


def test_requests_at_once_do_not_mix(served, expected):
    wanted = {depth: joined(expected(TALK, max_tokens=12, depth=depth)) for depth in (2, 3, 4)}
    assert len(set(wanted.values())) > 1
    found: dict[int, str] = {}

    def ask(number: int, depth: int) -> None:
        answer = served.client.chat.completions.create(model=f"tiny@{depth}", messages=TALK, **GREEDY)
        found[number] = answer.choices[0].message.content

    threads = [threading.Thread(target=ask, args=(i, depth)) for i, depth in enumerate([2, 3, 4] * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: wanted[depth] for i, depth in enumerate([2, 3, 4] * 2)}


def test_unknown_models_are_404_with_a_list(served):
    for model in ("tiny@9", "gpt-4"):
        with pytest.raises(openai.NotFoundError, match="available: tiny, tiny@2, tiny@3, tiny@4") as caught:
            served.client.chat.completions.create(model=model, messages=TALK)
        assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.NotFoundError, match="is not served"):
        served.client.models.retrieve("tiny@9")


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"top_k": 3}}, "top_k"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ],
)
def test_bad_bodies_are_400_and_name_the_field(served, wrong, param):
    with pytest.raises(openai.BadRequestError) as caught:
        served.client.chat.completions.create(**({"model": "tiny", "messages": TALK} | wrong))
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


def test_other_errors_have_the_same_shape(served):
    body = json.dumps({"model": "tiny", "messages": TALK})
    cases = [
        (("POST", "/v1/chat/completions", "{no"), {}, 400, "not valid JSON"),
        (
            ("POST", "/v1/chat/completions", body),
            {"Content-Type": "text/plain"},
            400,
            "application/json, not text/plain",
        ),
        (("POST", "/chat/completions", body), {}, 404, "the API is below /v1"),
        (("GET", "/v1/nothing"), {}, 404, "/v1/nothing"),
        (("GET", "/v1/completions"), {}, 405, "Method Not Allowed"),
        (("GET", "/v1/models"), {"Host": "evil.example:8000"}, 403, "localhost only"),
    ]
    for arguments, headers, status, message in cases:
        found, answer = served.raw(*arguments, **headers)
        assert found == status and message in answer["error"]["message"], answer
    with pytest.raises(openai.BadRequestError, match="the context has room for") as caught:
        served.client.completions.create(model="tiny", prompt="the way of " * 400)
    assert caught.value.code == "context_length_exceeded"


def test_what_the_client_sends_at_its_defaults_changes_nothing(served, expected):
    wanted = joined(expected(TALK, max_tokens=12))
    neutral: Any = {
        "n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "tools": [], "tool_choice": "none",
        "parallel_tool_calls": False, "service_tier": "auto", "response_format": {"type": "text"}, "logprobs": False,
        "reasoning_effort": "none", "stop": [], "user": "u", "store": False, "prompt_cache_key": "k",
        "extra_body": {"top_k": -1, "min_p": 0, "repetition_penalty": 1.0},
    }  # fmt: skip
    found = served.client.chat.completions.create(model="tiny", messages=TALK, **GREEDY, **neutral)
    assert found.choices[0].message.content == wanted
    parts = [{"type": "text", "text": TALK[1]["content"], "cache_control": {"type": "ephemeral"}}]
    again: Any = [TALK[0], {"role": "user", "content": parts, "name": "bob"}]
    assert served.client.chat.completions.create(model="tiny", messages=again, **GREEDY).choices[0].message == (
        found.choices[0].message
    )


def test_an_answer_and_an_empty_turn_can_be_sent_back(served, expected):
    first = served.client.chat.completions.create(model="tiny", messages=TALK, **GREEDY).choices[0].message
    talk: Any = [*TALK, first, {"role": "user", "content": "and?"}, {"role": "assistant", "content": None}]
    talk.append({"role": "user", "content": "so"})
    plain = [dict(message) for message in talk[:2]] + [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "so"},
    ]
    found = served.client.chat.completions.create(model="tiny", messages=talk, **GREEDY)
    assert found.choices[0].message.content == joined(expected(plain, max_tokens=12))
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    talk[4] = {"role": "assistant", "content": None, "tool_calls": [call]}
    with pytest.raises(openai.BadRequestError, match="ignores the tool calls of message 4") as caught:
        served.client.chat.completions.create(model="tiny", messages=talk, **GREEDY)
    assert caught.value.param == "messages"


def test_a_completion_of_tokens_is_that_of_their_text(served, expected, bundle):
    with Session(bundle, "onnx", threads=1) as session:
        ids, size = session.tokenizer.encode("the way of", begin=True), session.tokenizer.size
    found = served.client.completions.create(model="tiny", prompt=ids, **GREEDY)
    assert found.choices[0].text == joined(expected("the way of", max_tokens=12))
    with pytest.raises(
        openai.BadRequestError, match=f"the prompt has token id {size}, but the model's ids go from 0 to {size - 1}"
    ):
        served.client.completions.create(model="tiny", prompt=[1, size])
    with pytest.raises(openai.BadRequestError, match="has no variable enable_thinking") as caught:
        served.client.chat.completions.create(
            model="tiny", messages=TALK, extra_body={"chat_template_kwargs": {"enable_thinking": True}}
        )
    assert caught.value.param == "chat_template_kwargs.enable_thinking"


def test_who_goes_away_ends_the_work(bundle):
    """Answers without end hold the one writer up, unless it stops when their readers leave."""
    endless = {"model": "tiny", "prompt": "the", "max_tokens": 10**6, "temperature": 2.0, "seed": 1}
    server = Served(bundle, "--engine", "onnx")
    try:
        _, usage = time.monotonic(), None
        for stream in (True, False):
            port = int(server.url.rsplit(":", 1)[1].removesuffix("/v1"))
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            body = json.dumps(endless | {"stream": stream})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            if stream:
                assert connection.getresponse().readline().startswith(b"data:")
            else:
                time.sleep(0.3)
            connection.close()
        usage = server.client.completions.create(model="tiny", prompt="the", max_tokens=3, temperature=0).usage
        assert usage is not None and usage.completion_tokens <= 3
        ticks = cpu_ticks(server.process.pid)
        time.sleep(0.5)
        assert cpu_ticks(server.process.pid) - ticks < 20  # of 10 ms: it is idle
        server.client.completions.create(stream=True, **endless)
        assert server.end() == (0, "stopped\n")  # while an answer may still be being written
    finally:
        server.process.kill()


def test_the_event_loop_has_its_turn_between_pieces_that_wait():
    """Else it learns that a reader has left only when all of them are written to nobody."""

    async def read() -> list[int]:
        job = AnswerJob(piece for piece in ())
        seen: list[Piece] = []
        told: list[int] = []
        for number in range(9):
            job._made.put_nowait(Piece("a", "length" if number == 8 else None))
        async for piece in job.read():
            seen.append(piece)
            if len(seen) == 1:
                asyncio.get_running_loop().call_soon(lambda: told.append(len(seen)))
        return [*told, len(seen)]

    assert asyncio.run(read()) == [1, 9]


def test_who_waits_when_the_server_stops_is_told():
    """The answer that is being written and the one behind it."""

    def endless() -> Pieces:
        while True:
            time.sleep(0.001)
            yield Piece("the ")

    async def stopped(job: AnswerJob) -> str:
        with pytest.raises(Stopping, match="the server is stopping"):
            async for piece in job.read():
                assert piece.text == "the "
        return "told"

    async def ask() -> list[str]:
        worker = Worker()
        jobs = [worker.submit(endless()) for _ in range(2)]
        async for _ in jobs[0].read():
            break
        worker.stop()
        found = await asyncio.wait_for(asyncio.gather(*map(stopped, jobs)), 10)
        worker.join()
        return found

    assert asyncio.run(ask()) == ["told", "told"]


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_a_key_and_a_depth_of_its_own(bundle):
    server = Served(bundle, "--engine", "onnx", "--api-key", "secret", "--depth", "2", "--host", "0.0.0.0")
    try:
        with Session(bundle, "onnx", threads=1) as session:
            wanted = joined(list(session.chat(TALK, Settings(max_tokens=12, depth=2))))
        found = server.client.chat.completions.create(model="tiny", messages=TALK, **GREEDY)
        assert found.choices[0].message.content == wanted
        for key in ("wrong", "Secret", "secret2", "ключ"):
            status, answer = server.raw("GET", "/v1/models", Authorization=f"Bearer {key}".encode().decode("latin-1"))
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert server.raw("GET", "/v1/models")[0] == 401
        assert server.raw("GET", "/v1/models", Host="my.machine", Authorization="Bearer secret")[0] == 200
        code, err = server.end()
        assert code == 0 and err.count("warning: other machines reach this server") == 1
    finally:
        server.process.kill()


def refused(*arguments: object) -> str:
    command = [sys.executable, "-m", "compress", "serve", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_misuse_is_one_message(bundle, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 is in use" in refused(bundle, "--port", port)
    assert "there is no depth 9 here; there are: 2, 3, 4" in refused(bundle, "--port", 0, "--depth", 9)
    assert "is not a bundle" in refused(tmp_path, "--port", 0)
    for arguments, message in ((("nowhere.invalid", 0), "cannot listen on"), (("127.0.0.1", 70000), "0 and 65535")):
        with pytest.raises(UserError, match=message):
            listen(*arguments)


def test_a_broken_depth_is_an_error_in_the_answer(bundle, tmp_path):
    """llama.cpp opens a depth on first use, when the server already runs."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    server = Served(copy, "--engine", "llama.cpp", "--context", "256")
    try:
        (path,) = (copy / a["path"] for a in manifest["artifacts"] if a["format"] == "gguf" and a["depth"] == 2)
        path.unlink()
        path.write_bytes(b"something else")
        with pytest.raises(openai.InternalServerError, match="is not a GGUF file"):
            server.client.chat.completions.create(model="tiny@2", messages=TALK, **GREEDY)
        with pytest.raises(openai.APIError, match="is not a GGUF file"):
            list(server.client.chat.completions.create(model="tiny@2", messages=TALK, stream=True, **GREEDY))
        assert server.client.chat.completions.create(model="tiny", messages=TALK, **GREEDY).choices
    finally:
        server.process.kill()


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("one two three", ["two"]),
        ("one two three", ["three", "two"]),
        ("aaab and aab", ["aab"]),
        ("ababac", ["abac", "zz"]),
        ("nothing\n\nhere", ["\n\n"]),
        ("no end", ["end of"]),
        ("none", []),
    ],
)
def test_stop_texts_by_pieces_are_a_search_in_the_whole(text, stops, size):
    watch = StopTexts(stops)
    found = "".join(watch.push(text[i : i + size]) for i in range(0, len(text), size)) + watch.rest()
    starts = [text.index(stop) for stop in stops if stop in text]
    assert found == text[: min(starts, default=len(text))] and watch.found == bool(starts)
