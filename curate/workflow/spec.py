"""The recipe's `select` as the selection takes it: its rules, its budgets, its groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from curate.errors import UsageError
from curate.recipe.select import Worst

if TYPE_CHECKING:
    from curate.plan.step import RequestedScore
    from curate.recipe.load import Loaded
    from curate.store import Store

Budget = tuple[str, float]  # ("share", 0.8), ("rows", 100) or ("tokens", 5000)


@dataclass(frozen=True)
class SelectSpec:
    """A recipe's `select`. keep: {"share": .8} | {"rows": n} | {"tokens": n}. per: a column, or {column: {group: share or a keep of its own}}.

    worst: column of drop_worst -> the end that the recipe itself calls bad. seed: of what is random, `order_by: random` and `control`.
    """

    where: str | None = None
    drop_worst: Mapping[str, float] = field(default_factory=dict)
    order_by: str | None = None
    keep: Mapping[str, float] | None = None
    per: str | Mapping[str, Mapping[str, float | Mapping[str, float]]] | None = None
    duplicates: Literal["once", "as_found"] = "once"
    unknown: Literal["error", "keep", "drop"] = "error"
    exclude: Literal["heldout"] | None = None
    control: Literal["random", "length_matched", "random_of_all"] | None = None
    seed: int = 0
    worst: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def group(self) -> str | None:
        """The expression that `per` groups by."""
        return self.per if isinstance(self.per, str) else next(iter(self.per), None) if self.per else None

    @property
    def budgets(self) -> dict[str, Budget]:
        """The groups that `per` gives a budget of their own."""
        named = next(iter(self.per.values()), {}) if isinstance(self.per, Mapping) else {}
        return {group: budget_of(given) for group, given in named.items()}

    @property
    def counts_tokens(self) -> bool:
        kinds = [kind for kind, _ in self.budgets.values()] + list(self.keep or ())
        return "tokens" in kinds


def budget_of(given: float | Mapping[str, float] | None) -> Budget:
    """A share, or one of share, rows and tokens by name; all, if None."""
    if given is None:
        return ("share", 1.0)
    return next(iter(given.items())) if isinstance(given, Mapping) else ("share", given)


def spec_of(loaded: Loaded) -> SelectSpec:
    """The recipe's `select`; it has to have one."""
    asked = loaded.recipe.select
    assert asked is not None
    return SelectSpec(
        where=asked.where,
        drop_worst={name: one.share if isinstance(one, Worst) else one for name, one in asked.drop_worst.items()},
        order_by=asked.order_by,
        keep=asked.keep.given if asked.keep else None,
        per=asked.budgets,
        duplicates=asked.duplicates,
        unknown=asked.unknown,
        exclude=asked.exclude,
        control=asked.control,
        seed=seed_of(loaded),
        worst={name: one.worst for name, one in asked.drop_worst.items() if isinstance(one, Worst)},
    )


def seed_of(loaded: Loaded) -> int:
    """The seed of what is random in the selection."""
    asked = loaded.recipe.select
    return asked.seed if asked is not None and asked.seed is not None else loaded.recipe.engine.seed


def worst_ends(store: Store, wanted: Sequence[RequestedScore]) -> dict[str, str]:
    """Which end is bad: as imports said it of their columns, and as the scores declare it."""
    return {**store.worst_ends(), **{want.name: want.score.worst for want in wanted}}


def group_names(spec: SelectSpec, values: Iterable[str | None]) -> dict[str | None, str]:
    """What a recipe and a message call each group: its text; rows without one are NULL, in brackets where that is some row's text.

    A budget called None is theirs where no row has that text: earlier recipes call them so.
    """
    groups = dict.fromkeys(values)
    names: dict[str | None, str] = {group: group for group in groups if group is not None}
    if None in groups:
        null = "NULL"
        while null in names:
            null = f"({null})"
        old = "None" in spec.budgets and "None" not in names and null not in spec.budgets
        names[None] = "None" if old else null
    return names


def check_groups(spec: SelectSpec, groups: Iterable[str | None]) -> None:
    """UsageError for a group that no row is of, or that has no budget."""
    budgets, names, column = spec.budgets, set(group_names(spec, groups).values()), spec.group
    if not isinstance(spec.per, Mapping):
        return
    strange = sorted(set(budgets) - names)
    if strange:
        raise UsageError(
            f"select.per.{column}: no row has {column} = {strange[0]!r}; found {', '.join(sorted(names)) or 'no rows'}."
        )
    without = sorted(names - set(budgets))
    if without and not spec.keep:
        raise UsageError(
            f"select.per.{column}: no share for {without[0]!r}; give it one, or `keep` for all that are not named."
        )
