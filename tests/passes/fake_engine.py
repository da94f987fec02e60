"""A child that misbehaves as told: what sampling/vllm.py's parent side is tested against. Starts in a tenth of a second."""

from __future__ import annotations

import os
import signal
import sys

from curate.passes.sampling.process import serve


class Fake:
    """Wants at most 64 sequences to start and 1,024 tokens at a time to say its weights; reports what it was started with."""

    def __init__(self, **settings):
        if settings.get("max_num_seqs", 0) > 64:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if settings.get("dtype") == "float64":
            raise ValueError("float64 is not for me")
        self.settings = settings
        self.weights = settings.get("model")
        self.adapter = None

    def about(self):
        return {"max_model_len": self.settings.get("max_model_len"), "dtype": "float32"}

    def use(self, path):
        self.weights = path

    def adapt(self, path):
        assert path is None or self.settings["enable_lora"]
        self.adapter = path

    def told(self):
        return self.settings, self.weights, self.adapter

    def sample(self, ids, **_):
        word = "".join(map(chr, ids[0]))
        if word == "weights":
            if self.settings["max_num_batched_tokens"] > 1024:
                raise RuntimeError(
                    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"
                )
            return [[(self.weights, 1, -1.0, True)]]
        if word == "die":
            print("the last words", file=sys.stderr, flush=True)
            os._exit(3)
        if word == "interrupt":
            os.kill(os.getppid(), signal.SIGINT)
        if word == "refuse":
            raise ValueError("no such thing")
        while True:  # "hang"
            signal.pause()


if __name__ == "__main__":
    serve(Fake)
