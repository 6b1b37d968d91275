"""A server on loopback that speaks both dialects for a toy model, well or badly."""

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from stillroom.teachers.vocabulary import Vocabulary

Handler = BaseHTTPRequestHandler
Fault = Callable[[Handler, bytes], None]
"""Answers in place of the server; is given what the server would have answered."""


def toy_log_probs(tokens: list[int], vocabulary: Vocabulary) -> np.ndarray:
    """What the toy model thinks comes next: of tokens that are whole characters, a distribution for each beginning."""
    logits = np.random.default_rng(tokens).normal(0, 3, vocabulary.vocab_size)
    logits[_unlikely(vocabulary)] -= 30
    logits -= logits.max()
    return logits - np.log(np.exp(logits).sum())


@cache
def _unlikely(vocabulary: Vocabulary) -> list[int]:
    parts = {number for number, data in vocabulary.bytes.items() if "�" in data.decode("utf-8", "replace")}
    return sorted(parts | vocabulary.special)


def status(code: int, message: str = "no", **headers: str) -> Fault:
    def fault(handler: Handler, _: bytes) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(json.dumps({"error": {"message": message}}).encode())

    return fault


def half(handler: Handler, data: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])


def half_without_length(handler: Handler, data: bytes) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(data[: len(data) // 2])


def hang_up(handler: Handler, _: bytes) -> None:
    handler.connection.close()


def nested(handler: Handler, _: bytes) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"[" * 100_000)


@dataclass
class FakeServer:
    """What it is asked, and how it misbehaves."""

    vocabulary: Vocabulary
    tokenizer: PreTrainedTokenizerBase
    url: str = ""
    takes_ids: bool = True
    echoes: bool = True
    shifted: bool = False
    """It tells of each position what it thinks one position later."""
    served: str = "toy"
    version: bool = True
    ends: float = 0.0
    """What is added to the log-probability of the token that ends a text, before it is made whole again."""
    faults: deque[Fault | None] = field(default_factory=deque)
    """One for each request about tokens; None answers well."""
    alter: Callable[[dict[str, Any]], None] = lambda _: None
    """Changes each answer, after the first ``alter_after`` of them."""
    alter_after: int = 0
    before: Callable[[], None] = lambda: None
    """Is called before each answer."""
    asked: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def think(self, tokens: list[int]) -> np.ndarray:
        row = toy_log_probs(tokens, self.vocabulary)
        if self.ends:
            row[1] += self.ends
            row -= np.log(np.exp(row).sum())
        return row

    def text(self, number: int) -> str:
        return "" if number in self.vocabulary.special else self.vocabulary.bytes[number].decode("utf-8", "ignore")

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return {"data": [{"id": self.served, "max_model_len": 64}]}
        if path == "/version":
            return {"version": "0.99"}
        if path == "/v1/chat/completions":
            text = "".join(f"{message['role']}: {message['content']}\n" for message in body["messages"])
            return self.written(body, self.tokenizer(text)["input_ids"], chat=True)
        prompt = body["prompt"]
        tokens = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if "prompt_logprobs" in body:
            return self.scored(body, tokens)
        return self.echoed(body, tokens) if body.get("echo") and self.echoes else self.written(body, tokens, chat=False)

    def row(self, tokens: list[int], i: int) -> np.ndarray:
        return self.think(tokens[: i + self.shifted])

    def scored(self, body: dict[str, Any], tokens: list[int]) -> Any:
        told: list[Any] = [None]
        for i in range(1, len(tokens)):
            row = self.row(tokens, i)
            numbers = {tokens[i], *np.argsort(-row)[: body["prompt_logprobs"]].tolist()}
            told.append({str(number): {"logprob": row[number], "rank": 1, "decoded_token": "?"} for number in numbers})
        choice = {
            "index": 0,
            "text": "x",
            "prompt_logprobs": told,
            "prompt_token_ids": tokens,
            "finish_reason": "length",
        }
        return self.payload([choice], tokens, 1)

    def echoed(self, body: dict[str, Any], tokens: list[int]) -> Any:
        """It hides the beginning-of-sequence token where it was sent text, as llama.cpp does."""
        hidden = 1 if isinstance(body["prompt"], str) else 0
        own, tops = [], []
        for i in range(hidden, len(tokens)):
            row = self.row(tokens, i)
            entries = {self.text(number): row[number] for number in np.argsort(-row)[: body["logprobs"]].tolist()}
            own.append(row[tokens[i]])
            tops.append(entries | {self.text(tokens[i]): row[tokens[i]]})
        own[0] = tops[0] = None
        logprobs = {"tokens": [self.text(t) for t in tokens[hidden:]], "token_logprobs": own, "top_logprobs": tops}
        return self.payload([{"index": 0, "text": "", "logprobs": logprobs, "finish_reason": "length"}], tokens, 0)

    def written(self, body: dict[str, Any], prompt: list[int], *, chat: bool) -> Any:
        choices = []
        as_ids = body.get("return_tokens_as_token_ids")
        top = body.get("top_logprobs") if chat else body.get("logprobs")
        for j in range(body.get("n", 1)):
            tokens, rows = [], []
            random = np.random.default_rng([body.get("seed", 0), j])
            for _ in range(body["max_tokens"]):
                row = self.think([*prompt, *tokens])
                tokens.append(int(random.choice(len(row), p=np.exp(row))) if body["temperature"] else int(row.argmax()))
                rows.append(row)
            names = [f"token_id:{t}" if as_ids else self.text(t) for t in range(self.vocabulary.vocab_size)]
            text = "".join(self.text(t) for t in tokens)
            choice: dict[str, Any] = {"index": j, "finish_reason": "length"}
            choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            if body.get("return_token_ids"):
                choice["token_ids"] = tokens
            if top is not None:
                tops = [[(names[t], row[t]) for t in np.argsort(-row)[:top].tolist()] for row in rows]
                if chat:
                    content = [
                        {"token": names[t], "logprob": row[t], "bytes": None,
                         "top_logprobs": [{"token": name, "logprob": value, "bytes": None} for name, value in told]}
                        for t, row, told in zip(tokens, rows, tops, strict=True)
                    ]  # fmt: skip
                    choice["logprobs"] = {"content": content}
                else:
                    choice["logprobs"] = {
                        "tokens": [names[t] for t in tokens],
                        "token_logprobs": [row[t] for t, row in zip(tokens, rows, strict=True)],
                        "top_logprobs": [
                            dict(told) | {names[t]: row[t]} for t, row, told in zip(tokens, rows, tops, strict=True)
                        ],
                    }
            choices.append(choice)
        return self.payload(choices, prompt, sum(body["max_tokens"] for _ in choices))

    def payload(self, choices: list[Any], prompt: list[int], wrote: int) -> Any:
        return {"choices": choices, "usage": {"prompt_tokens": len(prompt), "completion_tokens": wrote}}


@contextmanager
def fake_server(tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Iterator[FakeServer]:
    """The server, in threads of its own."""
    fake = FakeServer(Vocabulary(tokenizer), tokenizer, **settings)

    class Handling(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True  # or each answer's second packet waits 40 ms for the client's acknowledgement

        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: dict[str, Any]) -> None:
            with fake.lock:
                fake.asked.append((self.path, body, dict(self.headers)))
                fake.under_way += 1
                fake.most_under_way = max(fake.most_under_way, fake.under_way)
                fault = fake.faults.popleft() if fake.faults and body else None
                altered = fake.alter_after <= 0 and bool(body)
                fake.alter_after -= bool(body)
            try:
                fake.before()
                if not fake.takes_ids and isinstance(body.get("prompt"), list):
                    fault = status(500, "4 validation errors: Input should be a valid string")
                payload = {} if fault and not fake.takes_ids else fake.answer(self.path, body)
                if self.path == "/version" and not fake.version:
                    fault = status(404)
                if altered:
                    fake.alter(payload)
                data = json.dumps(payload).encode()
                if fault is not None:
                    fault(self, data)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass
            finally:
                with fake.lock:
                    fake.under_way -= 1

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Says nothing of connections that were given up."""

    server = Server(("127.0.0.1", 0), Handling)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
