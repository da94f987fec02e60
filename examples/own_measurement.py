"""A measurement of your own in one file: it is read off the same forward pass as all others, at no second forward.

In a recipe:   scores: [own_measurement:stumble]          (this file beside the recipe, or a module that can be imported)
By itself:     python examples/own_measurement.py MODEL PAIRS.jsonl
"""

import sys

import curate


@curate.measurement(
    reads="forward",
    kind="preference",
    head=("logp", "top_logp"),
    columns={"chosen_stumbles": "share of tokens", "rejected_stumbles": "share of tokens"},
)
def stumbles(batch):
    """Share of a response's tokens that the model finds 3 nats less likely than its own favourite."""
    return {
        f"{name}_stumbles": side.mean((side.top_logp - side.logp > 3).double())
        for name, side in (("chosen", batch.chosen), ("rejected", batch.rejected))
    }


@curate.score(
    needs=("chosen_stumbles", "rejected_stumbles"),
    kind="preference",
    unit="share",
    worst="high",
    high_means="chosen is the odder one",
)
def stumble(chosen_stumbles, rejected_stumbles):
    """How much oftener the model stumbles over the chosen response than over the rejected one, (rows,)."""
    return chosen_stumbles - rejected_stumbles


if __name__ == "__main__":
    from curate.passes import forward
    from curate.passes.tokens import Limits, encode, load_tokenizer

    if len(sys.argv) != 3:
        sys.exit(__doc__)
    path, rows = sys.argv[1], curate.load(sys.argv[2])
    tokenizer = load_tokenizer(path)
    encoded = [encode(row, tokenizer, Limits(512)) for row in rows]
    with forward.load_model(path) as model:
        columns = forward.measure(model, encoded, [stumbles.measurement])
    for row, value in zip(rows, stumble(**columns)):
        print(f"{row.row_id}  {value:+.3f}")
