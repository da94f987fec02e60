"""A small server that speaks OpenAI's protocol over real HTTP: what it serves, and how its answers depend on the weights, is up to the test."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORDS = [" one", " two", " three", " four", " five", " six", " seven", " eight"]


class Served(ThreadingHTTPServer):
    """`weights` decide its answers, each with log-probabilities unless `logprobs` is False. models: [{id, root, …}]. noise: added to every
    log-probability, nats. broken: path -> (status, content type, body) that is sent there instead.
    """

    daemon_threads = True

    def __init__(self, weights="a", models=None, version="0.32.0", logprobs=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.weights, self.version, self.logprobs, self.noise, self.broken = weights, version, logprobs, 0.0, {}
        self.models = models or [{"id": "policy", "root": "/models/policy", "max_model_len": 256}]
        self.refuses = lambda prompt: False  # prompts at which it hangs up
        self.says = None  # (prompt, number of the answer) -> (content, reasoning, finish_reason) instead of words
        self.requests, self.after = [], None  # after: called with the server when so many requests were answered
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def sampled(self):
        """The requests that were a run's work: not greedy."""
        return [request for request in self.requests if request["temperature"]]

    def __exit__(self, *exception):
        self.shutdown()
        super().__exit__(*exception)

    def tokens(self, prompt, seed):
        digest = hashlib.sha256(f"{self.weights}|{prompt}|{seed}".encode()).digest()
        return [(WORDS[byte % 8], -0.05 - byte / 100 - self.noise) for byte in digest[:4]]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, kind, body):
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def answer(self, body, status=200):
        self.send(status, "application/json", json.dumps(body))

    def was_broken(self):
        if self.path in self.server.broken:
            self.send(*self.server.broken[self.path])
        return self.path in self.server.broken

    def do_GET(self):
        if self.was_broken():
            return
        if self.path == "/v1/models":
            created = len(self.server.requests)  # vLLM's is the time of the request
            self.answer({"object": "list", "data": [{"created": created, **m} for m in self.server.models]})
        elif self.path == "/version" and self.server.version:
            self.answer({"version": self.server.version})
        else:
            self.answer({"error": {"message": "no such path"}}, 404)

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.was_broken():
            return
        self.server.requests.append(request)
        chat = self.path.endswith("/chat/completions")
        prompt = json.dumps(request["messages"]) if chat else request["prompt"]
        if self.server.refuses(prompt):
            self.close_connection = True
            return
        seed = request.get("seed", 0) if request["temperature"] else 0
        choices = [self.choice(prompt, seed + k, k, chat=chat) for k in range(request.get("n", 1))]
        if self.server.after:
            self.server.after(self.server)
        usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        self.answer({"id": "1", "object": "x", "created": 0, "model": "m", "choices": choices, "usage": usage})

    def choice(self, prompt, seed, index, *, chat):
        tokens = self.server.tokens(prompt, seed)
        if self.server.says:
            content, reasoning, why = self.server.says(prompt, index)
            found = {"index": index, "finish_reason": why, "logprobs": None}
            return found | (
                {
                    "message": {
                        "role": "assistant",
                        "content": content,
                        **({"reasoning_content": reasoning} if reasoning else {}),
                    }
                }
                if chat
                else {"text": content}
            )
        text = "".join(token for token, _ in tokens)
        found = {"index": index, "finish_reason": "stop", "logprobs": None}
        if chat:
            content = [{"token": token, "logprob": logp, "top_logprobs": []} for token, logp in tokens]
            found["message"] = {"role": "assistant", "content": text}
            found["logprobs"] = {"content": content} if self.server.logprobs else None
        else:
            found["text"] = text
            if self.server.logprobs:
                found["logprobs"] = {"tokens": [t for t, _ in tokens], "token_logprobs": [p for _, p in tokens]}
        return found
