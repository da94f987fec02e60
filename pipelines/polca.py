"""POLCA: what a run's loss curve hides. Each row's change of loss, taken apart along the directions that the run moved in, and clustered.

    python pipelines/polca.py configs/prioritize_sft.yaml [--set source.limit=2000] [--smallest 20] [--json]

Takes an SFT recipe with `models.checkpoints`; scores and selection play no part. Prints completeness, each direction's share of the loss change,
its clusters with the rows that stand for them, and hidden breakthroughs; the plain loss is clustered beside them as the control. Kept in the
store: a second call runs no model. Exit 0 done, 1 failed, 2 wrong recipe. Source: Kangaslahti et al. 2025, arXiv:2506.15872.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from curate.console import Progress, out, to_json, told
from curate.errors import CurateError
from curate.jobs.polca.polca import TOLERANCE, audit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="put a value over the recipe's")
    parser.add_argument("--store", type=Path, help="another store's folder")
    parser.add_argument("--smallest", type=int, help="rows that make a cluster (default: 2%% of the rows, 5 at least)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="of each segment's sum, in mean |Δloss| (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    asked = parser.parse_args()
    try:
        found = audit(
            asked.recipe,
            set=asked.set,
            store=asked.store,
            progress=Progress(quiet=asked.quiet),
            smallest=asked.smallest,
            tolerance=asked.tolerance,
        )
    except (CurateError, KeyboardInterrupt) as error:
        return told(error)
    out(to_json(found.to_json()) if asked.json else found.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
