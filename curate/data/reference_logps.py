"""The reference model's log-probabilities as columns of an export of pairs, under the names that trainers read them by.

ref_chosen_logps, ref_rejected_logps                  TRL's DPOTrainer (1.16), with the mixin of trl_trainers.py
reference_score_chosen, reference_score_rejected      fairseq2's preference recipe, with reference_model None
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from curate.errors import ValidationError

if TYPE_CHECKING:
    import pyarrow as pa

MEASURED = ("chosen_logp", "rejected_logp")
NAMES = {
    "chosen_logp": ("ref_chosen_logps", "reference_score_chosen"),
    "rejected_logp": ("ref_rejected_logps", "reference_score_rejected"),
}


def with_reference(
    tables: Iterator[pa.Table], schema: pa.Schema, hidden: Collection[str]
) -> tuple[Iterator[pa.Table], pa.Schema]:
    """The rows with these columns, and the schema. hidden: of the measured columns those that do not stand there under their own names.

    ValidationError, as the rows pass, where one of them was not measured.
    """
    import pyarrow as pa

    free = [name for names in NAMES.values() for name in names if name not in schema.names]
    fields = [field for field in schema if field.name not in hidden]
    wider = pa.schema([*fields, *((name, pa.float64()) for name in free)])

    def rows() -> Iterator[pa.Table]:
        for table in tables:
            columns = {field.name: table[field.name] for field in fields}
            for name, theirs in NAMES.items():
                column = table[name].cast(pa.float64())
                if column.null_count:
                    row_id = table.filter(column.is_null())["row_id"][0].as_py()
                    raise ValidationError(
                        f"export.reference_logps: {name} of row {row_id} is not known, and of {column.null_count - 1:,} more. Leave them out with "
                        "select.where: 'token_problem IS NULL'."
                    )
                columns |= {one: column for one in theirs if one in free}
            yield pa.Table.from_arrays([columns[field.name] for field in wider], schema=wider)

    return rows(), wider
