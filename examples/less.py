"""Which rows of a pool serve which of your tasks? LESS from a recipe, on problems whose skill is known: how many rows come out under their own.

    python examples/less.py [FOLDER] [--each 30]      FOLDER keeps the recipe, its rows and the store; without one nothing is kept

A pool of the demo's word problems, eight skills; as targets four more problems of each, in one file with a column `skill`. The model is the demo's
base, before any training: one checkpoint, plain gradients. Your own recipe names the checkpoints of a short run on a sample of the pool, and
step: adam. Beside it `influence`, the plain inner product, in which a row's length and a target's count.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import yaml

import curate
from curate.console import out, table
from curate.jobs.demo.model import BASE
from curate.jobs.demo.task import CELLS, problem

SKILLS = sorted(CELLS)


def write(folder: Path, each: int, seed: int = 0) -> Path:
    """The recipe, its pool of `each` problems a skill, and the targets: together, and for `influence` one by one."""
    rng = random.Random(seed)
    pool, examples = (
        [{"prompt": p.prompt, "completion": p.completion, "skill": p.cell} for _ in range(n) for p in (problem(rng, skill) for skill in SKILLS)]
        for n in (each, 4)
    )  # fmt: skip
    of_skill = {skill: [row for row in examples if row["skill"] == skill] for skill in SKILLS}
    for name, rows in {"pool": pool, "examples": examples, **of_skill}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    targets = {"skills": {"path": "examples.jsonl", "of": "completion", "per": "skill"}}
    targets |= {skill: {"path": f"{skill}.jsonl", "of": "completion"} for skill in SKILLS}
    scores: list = [{"influence_cosine": {"target": "skills"}}, {"influence_group": {"target": "skills"}}]
    scores += [{"influence": {"target": skill, "as": f"product_{skill}"}} for skill in SKILLS]
    recipe = {"kind": "sft", "source": "pool.jsonl", "models": {"reference": str(BASE)}, "targets": targets}
    (folder / "less.yaml").write_text(yaml.safe_dump(recipe | {"scores": scores}, sort_keys=False))
    return folder / "less.yaml"


def right(recipe: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each row's own skill, and whether its best target is that one: by the cosine, by the product."""
    scored = curate.run(recipe).store.scored()
    own = scored["skill"].to_numpy()
    products = np.stack([scored[f"product_{skill}"].to_numpy() for skill in SKILLS], 1)
    return own, scored["influence_group_name"].to_numpy() == own, np.asarray(SKILLS)[products.argmax(1)] == own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--each", type=int, default=30, help="rows of the pool of each skill (default 30)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        own, cosine, product = right(write(folder, asked.each))
    rows = [(skill, int(at.sum()), cosine[at].mean(), product[at].mean()) for skill in SKILLS for at in [own == skill]]
    rows.append(("all", len(own), cosine.mean(), product.mean()))
    out(table(rows, head=("skill", "rows", "best target is its own: cosine", "product")))


if __name__ == "__main__":
    main()
