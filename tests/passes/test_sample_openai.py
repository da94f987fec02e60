"""A real vLLM server on loopback against transformers, and a small server that fails on purpose."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("openai")

from curate.errors import EngineError, UsageError
from curate.passes.sampling.engines import sampler_identity
from curate.passes.sampling.hf import HfSampler
from curate.passes.sampling.openai import OpenAISampler
from curate.passes.sampling.reasoned import told_apart
from curate.passes.sampling.types import Prompt, Sampling
from curate.passes.tokenizer import load_tokenizer
from tests.tiny_models import make_llama

CONTEXT = 96
TAGS = ("<think>", "</think>")  # what the served model thinks in: all up to </think>, as DeepSeek R1's are read
ASKED = ({"role": "user", "content": "what is 3 plus 4?"},)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """(url, model folder) of one vLLM server for all tests; about 30 s to start."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from curate.passes.sampling.vllm import cpu_environment

    model = make_llama(tmp_path_factory.mktemp("served") / "tiny", seed=1, context=CONTEXT, template=True, added=TAGS)
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant:", "assistant:<think>")
    tokenizer.save_pretrained(model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "tiny", "--dtype", "float32",
        "--enforce-eager", "--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", "32", "--max-model-len", str(CONTEXT),
        "--no-enable-chunked-prefill", "--reasoning-parser", "deepseek_r1",
    ]  # fmt: skip
    environment = {
        **os.environ, **cpu_environment(), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    lines = deque(maxlen=30)
    for line in process.stdout:  # blocks until the server says it is up, or ends
        lines.append(line)
        if "Application startup complete" in line:
            break
    else:
        pytest.fail("the vLLM server did not start:\n" + "".join(lines))
    drain = threading.Thread(target=deque, args=(process.stdout, 0))  # a full pipe would stop the server
    drain.start()
    yield f"http://127.0.0.1:{port}/v1", model
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    drain.join()
    process.stdout.close()


@pytest.fixture(scope="session")
def prompts(server):
    tokenizer = load_tokenizer(server[1])
    texts = [f"what is {i} plus {i}? " for i in range(12)]
    return [Prompt(tokenizer(text)["input_ids"], text, None, seed=i) for i, text in enumerate(texts)]


def opened(url, **more):
    return OpenAISampler({"url": url, "concurrency": 8, **more})


def as_chat(tokenizer):
    ids = tokenizer.apply_chat_template(
        [dict(m) for m in ASKED], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    return Prompt(list(ids), "", ASKED, 5)


@pytest.mark.slow
def test_a_served_thinking_model_has_reasoning_and_answer_apart_within_the_servers_budget(server):
    """vLLM's reasoning parser and its own budget, asked for by extra_body; top_k, min_p and the penalty are taken too."""
    prompt = as_chat(load_tokenizer(server[1]))
    settings = Sampling(n=24, max_new_tokens=16, temperature=1.0, top_k=30, min_p=0.001, repetition_penalty=1.1)
    with opened(server[0]) as sampler:
        (free,) = sampler.sample([prompt], settings)
        (within,) = sampler.sample([prompt], replace(settings, extra_body={"thinking_token_budget": 4}))
    cut = [s for s in free if s.reasoning and not s.text and not s.finished]
    assert len(cut) > 4 and all(s.n_tokens == 16 and s.logp < 0 and "</think>" not in s.reasoning for s in cut)
    answered = [s for s in within if s.text]
    assert len(answered) > 16 and max(len(s.reasoning or "") for s in answered) in (3, 4)


@pytest.mark.slow
def test_served_greedy_equals_transformers(server, prompts):
    url, model = server
    greedy = Sampling(n=2, temperature=0, max_new_tokens=10)
    asked = [*prompts, as_chat(load_tokenizer(model))]
    with opened(url) as sampler, HfSampler(model) as fallback:
        served, ours = sampler.sample(asked, greedy), fallback.sample(asked, greedy)
        assert sampler.notes == [] and sampler.model == "tiny" and sampler.context == CONTEXT
    ours[-1] = [told_apart(sample, TAGS, opened=True) for sample in ours[-1]]
    for one, other in zip(served, ours, strict=True):
        assert len(one) == 2 and one[0] == one[1] and one[0].reasoning == other[0].reasoning
        assert (one[0].text, one[0].n_tokens, one[0].finished) == (other[0].text, other[0].n_tokens, other[0].finished)
        assert one[0].logp == pytest.approx(other[0].logp, abs=1e-3)


@pytest.mark.slow
def test_served_samples_repeat_with_their_seeds_and_end_at_stop_strings(server, prompts):
    settings = Sampling(n=4, temperature=0.9, top_p=0.9, max_new_tokens=24, stop=("e",))
    with opened(server[0]) as sampler:
        first, second = sampler.sample(prompts, settings), sampler.sample(prompts, settings)
    assert [[s.text for s in row] for row in first] == [[s.text for s in row] for row in second]
    samples = [s for row in first for s in row]
    assert len(samples) == 48 and len({s.text for s in samples}) > 24
    assert not any("e" in s.text for s in samples) and any(s.finished for s in samples)
    assert all(s.n_tokens <= 24 and s.logp < 0 for s in samples)


@pytest.mark.slow
def test_a_prompt_without_room_on_the_server_gives_no_samples(server):
    text = "a" * (CONTEXT + 5)
    known, unknown = (
        Prompt([1] * (CONTEXT + 6), text, None, 1),
        Prompt([], text, None, 1),
    )  # ids [] : the server's own tokenizer counts
    with opened(server[0]) as sampler:
        assert sampler.sample([known, unknown], Sampling(max_new_tokens=4)) == [[], []]


@pytest.mark.slow
def test_a_model_that_is_not_served_is_named_with_those_that_are(server, tmp_path):
    with pytest.raises(EngineError, match=r"serves \(tiny\), found 'huge'"):
        opened(server[0], model="huge")
    with opened(server[0]) as sampler, pytest.raises(EngineError, match="serves tiny, not .*checkpoint-5"):
        sampler.use(tmp_path / "checkpoint-5")


@pytest.mark.slow
def test_probes_of_one_served_model_agree(server):
    """One by one, all at once, and again."""
    from curate.passes.sampling.server_probe import FIXED, difference, measured_noise

    prompts = [prompt[:60] for prompt in FIXED]
    with opened(server[0]) as sampler:
        said = sampler.description()
        assert said["model"] == "tiny" and said["root"] == str(server[1]) and said["max_model_len"] == CONTEXT
        assert said == sampler.description()
        first = sampler.probe(prompts)
        kept, noise = measured_noise(first, sampler.probe(prompts, at_once=True))
        assert kept == first and len(first) == len(prompts) and all(spoken.logps for spoken in first.values())
        assert difference(first, sampler.probe(prompts), noise) is None and noise.most < 1e-3


class Scripted(ThreadingHTTPServer):
    """Answers each POST by the next entry of `script` (its last one for ever): an HTTP status, "ok", "hang", or a function of the request."""

    daemon_threads = True

    def __init__(self, *script, models=("m",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.models, self.requests = deque(script), models, []
        self.lock, self.release = threading.Condition(), threading.Event()
        self.in_flight = self.most_in_flight = self.arrived = 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """A client that gave up on a request has closed its end: no news."""

    def __exit__(self, *exception):
        self.release.set()
        self.shutdown()
        super().__exit__(*exception)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer(
            200,
            {
                "object": "list",
                "data": [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in self.server.models],
            },
        )

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(request)
            step = self.server.script.popleft() if len(self.server.script) > 1 else self.server.script[0]
        if step == "hang":
            self.server.release.wait(30)
            return
        if callable(step):
            step = step(self.server, request)
        if isinstance(step, tuple):
            self.answer(step[0], {"error": {"message": step[1], "type": "x", "code": step[0]}})
        elif isinstance(step, int):
            self.answer(step, {"error": {"message": f"status {step}", "type": "x", "code": step}})
        else:
            self.answer(200, choices(request, request.get("n", 1)))


def choices(request, n, *, logprobs=True):
    logps = (
        {"tokens": ["a", "b"], "token_logprobs": [-0.5, -0.25], "top_logprobs": None, "text_offset": [0, 1]}
        if logprobs
        else None
    )
    found = [
        {
            "index": k,
            "text": f"{request['prompt']}:{request.get('seed', 0) % 97}+{k}",
            "finish_reason": "stop",
            "logprobs": logps,
        }
        for k in range(n)
    ]
    return {
        "id": "1",
        "object": "text_completion",
        "created": 0,
        "model": "m",
        "choices": found,
        "usage": {"prompt_tokens": 3, "completion_tokens": 2 * n, "total_tokens": 9},
    }


def texts(n):
    return [Prompt([], f"row {i}", None, seed=i) for i in range(n)]


def test_busy_and_broken_answers_are_tried_again():
    with Scripted(429, 500, 503, "ok") as server:
        samples = opened(server.url, retries=3).sample(texts(1), Sampling(n=2, max_new_tokens=5))
        assert len(samples[0]) == 2 and samples[0][0].logp == -0.75 and samples[0][0].n_tokens == 2
        assert len(server.requests) == 4


@pytest.mark.parametrize(("status", "says"), [
    (500, "failed after 3 attempts"),
    (429, "too many requests after 3 attempts.*server.concurrency"),
    (401, "OPENAI_KEY_OF_THE_TEST is not set.*server.key_env"),
    (404, "does not know the model 'm'.*server.model"),
    ((400, "temperature is not what we like"), "temperature is not what we like"),
])  # fmt: skip
def test_what_stays_broken_says_what_to_do(status, says):
    with Scripted(status) as server, pytest.raises(EngineError, match=says):
        opened(server.url, retries=2, key_env="OPENAI_KEY_OF_THE_TEST").sample(texts(3), Sampling())


def test_an_answer_that_does_not_come_is_a_timeout():
    with (
        Scripted("hang") as server,
        pytest.raises(EngineError, match=r"no answer within 0.2 s at the first attempt.*server.timeout"),
    ):
        opened(server.url, retries=0, timeout=0.2).sample(texts(2), Sampling())


def test_a_server_that_is_not_there_is_said_with_the_command_that_starts_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(EngineError, match=r"no server reached.*vllm.entrypoints.openai.api_server"):
            opened(url, retries=0)
    with pytest.raises(UsageError, match=r"server\.url"):
        opened(None)


def test_several_models_want_a_name():
    with Scripted("ok", models=("one", "two")) as server:
        with pytest.raises(EngineError, match=r"found 2: one, two.*server.model"):
            opened(server.url)
        assert (
            opened(server.url, model="two").engine
            == sampler_identity("openai", None, server={"url": server.url, "model": "two"})[0]
        )


def test_order_and_bounded_concurrency():
    def together(server, request):
        with server.lock:
            server.arrived += 1
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            server.lock.notify_all()
            server.lock.wait_for(lambda: server.arrived >= 4, timeout=20)  # the first four wait for each other
            server.in_flight -= 1
        return "ok"

    with Scripted(together) as server:
        samples = opened(server.url, concurrency=4).sample(texts(13), Sampling(max_new_tokens=2))
        assert [row[0].text.split(":")[0] for row in samples] == [f"row {i}" for i in range(13)]
        assert server.most_in_flight == 4


def test_a_server_without_n_seed_or_logprobs_is_asked_without_them():
    def plain(server, request):
        for name, complaint in (
            ("logprobs", "logprobs are not supported"),
            ("n", "'n' must be 1"),
            ("seed", "unknown field: seed"),
        ):
            if name in request:
                return 400, complaint
        return "ok"

    with Scripted(plain) as server:
        sampler = opened(server.url)
        samples = sampler.sample(texts(5), Sampling(n=3, max_new_tokens=2))
        assert [len(row) for row in samples] == [3] * 5
        assert [[word in note for note in sampler.notes].count(True) for word in ("`n`", "`seed`", "`logprobs`")] == [
            1,
            1,
            1,
        ]


def test_a_server_that_ignores_n_is_asked_again_with_the_seed_of_the_next_sample():
    asked_alone = Sampling(n=3, max_new_tokens=2)
    with Scripted("ok") as server:
        server.RequestHandlerClass = type(
            "One",
            (Handler,),
            {
                "answer": lambda self, status, body: Handler.answer(
                    self, status, {**body, "choices": body["choices"][:1]} if "choices" in body else body
                )
            },
        )
        sampler = opened(server.url)
        (samples,) = sampler.sample(texts(1), asked_alone)
        seeds = [request["seed"] for request in server.requests]
        assert len(samples) == 3 and seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2]
        assert "one request per sample" in sampler.notes[0]


def test_further_samples_are_asked_with_the_seeds_of_their_numbers():
    prompt, later = Prompt([], "row 1", None, seed=1), Prompt([], "row 1", None, seed=1, first=4)
    with Scripted("ok") as server:
        sampler = opened(server.url)
        sampler.sample([prompt], Sampling(n=6, max_new_tokens=2))
        sampler.sample([later], Sampling(n=2, max_new_tokens=2))
        first, second = server.requests
        assert second["seed"] == first["seed"] + 4 and second["n"] == 2


def test_works_where_a_loop_is_running():
    async def notebook(url):
        return opened(url).sample(texts(1), Sampling(max_new_tokens=2))

    with Scripted("ok") as server:
        assert asyncio.run(notebook(server.url))[0][0].finished
