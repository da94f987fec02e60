"""What an engine sampled, as rows for the forward pass: the engine's log-probabilities are those of the weights that it should have."""

from __future__ import annotations

import numpy as np

from curate.passes.tokens import Encoded


def sampled_rows(sampler, tokenizer, prompts, settings):
    """(rows, (rows,) float64 the engine's own logp) of every sample whose text gives back its tokens; EOS is one of them."""
    rows, logps = [], []
    for prompt, samples in zip(prompts, sampler.sample(prompts, settings), strict=True):
        for sample in samples:
            ids = tokenizer(sample.text, add_special_tokens=False)["input_ids"]
            ids = [*ids, tokenizer.eos_token_id] if sample.finished else ids
            if len(ids) == sample.n_tokens:  # else a special token in the middle, which the text leaves out
                rows.append(Encoded(np.array([*prompt.ids, *ids], np.int32), len(prompt.ids)))
                logps.append(sample.logp)
    return rows, np.array(logps)
