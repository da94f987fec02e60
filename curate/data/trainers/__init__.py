"""Exports for trainers other than TRL, one file a trainer: the same rows under the names, in the files and with the settings that it reads.

data/<split>-00000.jsonl or .parquet      the rows
trainer_args.json                         the settings that name their columns; LLaMA-Factory and axolotl have files of their own for it
"""

from __future__ import annotations

from curate.data.trainers import axolotl, llama_factory, openrlhf, verl
from curate.data.trainers.base import Trainer
from curate.errors import ValidationError

TRAINERS: dict[str, Trainer] = {
    made.name: made for made in (llama_factory.TRAINER, axolotl.TRAINER, openrlhf.TRAINER, verl.TRAINER)
}
FILES = frozenset(name for trainer in TRAINERS.values() for name in trainer.files)


def check_sort(layout: str, sort: str) -> None:
    """ValidationError where the trainer of a layout takes no rows of this sort (the words of `Plan.layout`)."""
    trainer = TRAINERS.get(layout)
    if trainer is None or sort in trainer.takes:
        return
    others = ", ".join(["trl", *(name for name, other in TRAINERS.items() if sort in other.takes)])
    why = trainer.why_not.get(sort, f"{trainer.title} has no such rows")
    raise ValidationError(
        f"export.layout {layout}: these rows are {sort}, and {why}. Layouts that take them: {others}."
    )
