"""Which columns of a text table (csv, tsv) are numbers. Only those are read as numbers that can be written back: nothing is lost of a cell.

    3  -7  0.5  1.50  1e-3  2.5E+07                        numbers (a zero at a decimal's end is not kept)
    007  +5  1_000  1e5  12345678901234567890123  1.00000000000000000001  NaN  2026-11-27     text, as it stands

`1e5` is text because no program writes a number so (they write 1e+05), but ids look so.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

LONGEST = 32
WHOLE = re.compile(r"-?(?:0|[1-9]\d*)", re.ASCII)
DECIMAL = re.compile(r"-?(?:0|[1-9]\d*)?(?:\.\d+)?(?:(?<=\d)[eE][+-]\d+)?|-?(?:0|[1-9]\d*)\.\d+[eE]\d+", re.ASCII)


def number_columns(head: list[dict[str, Any]]) -> frozenset[str]:
    """Columns whose filled cells are all numbers."""
    filled = {name: [row[name] for row in head if row.get(name)] for name in head[0]}
    return frozenset(
        name for name, cells in filled.items() if cells and not any(isinstance(number(cell), str) for cell in cells)
    )


def number(cell: Any) -> Any:
    """A text cell as the number it spells, None where it is empty, else as it is."""
    if not isinstance(cell, str):
        return cell
    if not cell:
        return None
    if WHOLE.fullmatch(cell):
        return int(cell) if cell != "-0" and len(cell) < 20 and abs(int(cell)) < 2**63 else cell
    if not DECIMAL.fullmatch(cell) or not cell[-1].isdigit() or len(cell) > LONGEST:
        return cell
    value = float(cell)
    return value if Decimal(repr(value)) == Decimal(cell) else cell
