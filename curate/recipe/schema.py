"""The recipe: which scores are wanted, over which models and checkpoints, and what to select.

Strict pydantic models of the YAML: `Recipe` here, its sections in sources.py (rows), sections.py (models and engines) and select.py. An unknown key,
a misspelt score or a bad type is an error that names the file, the line, the key and the nearest right one. Relative paths are relative to the
recipe's folder, so a recipe means the same from everywhere.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from curate.recipe.doors import PathText
from curate.recipe.sections import Engine, Forecast, Gradients, Models, Sampling, Server, Strict, Tokens
from curate.recipe.select import Export, Select
from curate.recipe.sources import Source, Target, inherit
from curate.rows import ROW_COLUMNS


class ScoreRequest(Strict):
    """A score under the name that its column gets: two settings of one score live side by side under two names."""

    score: str
    params: dict[str, Any] = Field({})
    name: str

    @classmethod
    def read(cls, entry: Any) -> ScoreRequest:
        """A name, {name: its settings}, or {score, params, name} as a recipe that was read has it. ValueError for anything else."""
        if isinstance(entry, ScoreRequest):
            return entry
        score, params = _score_and_params(entry)
        name = params.pop("as", None) or score.rpartition(":")[2]
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
            raise ValueError(
                f"{name!r} cannot name a column; use letters, digits and underscores (`as: {re.sub(r'[^A-Za-z0-9_]', '_', str(name))}`)"
            )
        if str(name).lower() in (*ROW_COLUMNS, "index"):
            raise ValueError(
                f"{name!r} is a column that `scored` has of every row, so no score can be called that; name it otherwise, such as `as: {name}_score`"
            )
        return cls(score=score, params=params, name=str(name))


def _score_and_params(entry: Any) -> tuple[str, dict[str, Any]]:
    """What is scored, and its settings with `as` among them."""
    score: Any = None
    params: Any = None
    if isinstance(entry, str):
        score, params = entry, {}
    elif isinstance(entry, dict) and len(entry) == 1:
        score, params = next(iter(entry.items()))
        params = params or {}
    elif isinstance(entry, dict) and "score" in entry:
        score, params = entry["score"], dict(entry.get("params", {}))
        if "name" in entry:
            params["as"] = entry["name"]
    if not isinstance(score, str) or not isinstance(params, dict):
        raise ValueError("a score is a name, or a name with its settings: `flip_loss: {beta: 0.1}`")
    return score, dict(params)


class Recipe(Strict):
    """One recipe: the whole of what a run does."""

    kind: Literal["preference", "sft"] = Field(description="what a row is: a preference pair, or an SFT example")
    store: PathText | None = Field(None, description="the store's folder; default: `store` beside the recipe")
    source: Source | None = None
    heldout: Source | None = Field(
        None,
        description="rows to calibrate and test on, never selected; read as `source` is where it does not say otherwise",
    )
    models: Models = Models()
    tokens: Tokens = Tokens()
    engine: Engine = Engine()
    gradients: Gradients = Gradients()
    server: Server = Server()
    sampling: Sampling = Sampling()
    targets: dict[Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")], Target] = Field({})
    forecast: Forecast = Forecast()
    scores: Annotated[
        list[ScoreRequest], BeforeValidator(lambda v: [ScoreRequest.read(e) for e in v] if isinstance(v, list) else v)
    ] = Field(
        [],
        description="names, or names with settings: `flip_loss: {beta: 0.1}`; `as:` gives a second setting its own name",
    )
    select: Select | None = None
    export: Export | None = None

    @model_validator(mode="after")
    def rows_are_read_alike(self) -> Recipe:
        """What `heldout` and `targets` do not say of their rows is as `source` says it."""
        if self.heldout is not None:
            object.__setattr__(self, "heldout", inherit(self.heldout, self.source))
        targets = {n: inherit(t, self.source, same_kind=t.kind == self.kind) for n, t in self.targets.items()}
        object.__setattr__(self, "targets", targets)
        return self

    @model_validator(mode="after")
    def selects_what_is_there(self) -> Recipe:
        if self.select is not None and self.select.exclude and self.heldout is None:
            raise ValueError("select.exclude: heldout needs `heldout:`, the rows that are not to be selected")
        if self.export is not None and self.export.control == "random" and self.select is not None:
            if self.select.control not in (None, "random_of_all"):
                raise ValueError(
                    f"export.control: random draws from all rows (select.control: random_of_all), and select.control is {self.select.control}; "
                    "say export.control: true for that one"
                )
            object.__setattr__(self, "select", self.select.model_copy(update={"control": "random_of_all"}))
        if self.export is not None and self.export.control and (self.select is None or self.select.control is None):
            raise ValueError(
                "export.control needs `select.control`, which says how the control is drawn; or, of a `select`, say export.control: random"
            )
        return self

    @model_validator(mode="after")
    def turns_are_of_examples(self) -> Recipe:
        if self.tokens.turns == "all" and self.kind == "preference":
            raise ValueError(
                "tokens.turns: all is for kind: sft; of a preference pair the chosen and the rejected response are measured, and no turn before "
                "them (`--set tokens.turns=last`)"
            )
        if self.export is not None and self.export.order == "order_by" and not (self.select and self.select.order_by):
            raise ValueError("export.order: order_by needs `select.order_by`, which says what the order is")
        if self.export is not None and self.export.reference_logps and self.kind != "preference":
            raise ValueError("export.reference_logps is of pairs, and kind is sft")
        if self.export is not None and self.export.reference_logps and self.export.format != "trl":
            raise ValueError(
                f"export.reference_logps is of pairs, which export.format {self.export.format} does not keep; take format: trl"
            )
        return self

    @model_validator(mode="after")
    def bands_are_of_graded_rows(self) -> Recipe:
        if self.kind == "preference" and not isinstance(self.sampling.samples, int):
            raise ValueError(
                "sampling.samples: answers to pairs are not graded, so no number of them decides a band; give a number"
            )
        return self

    @model_validator(mode="after")
    def sampler_takes_it(self) -> Recipe:
        sampling, of_server = self.sampling, self.engine.sampler == "openai"
        if sampling.extra_body and not of_server:
            raise ValueError(
                f"sampling.extra_body is for a server's requests, and engine.sampler is {self.engine.sampler}; take it out "
                "(`--set sampling.extra_body={}`), or sample on a server: `--set engine.sampler=openai`"
            )
        if sampling.thinking_tokens is not None and of_server:
            raise ValueError(
                "sampling.thinking_tokens is for engines that curate runs; a server has a budget of its own, such as vLLM's "
                "`sampling.extra_body: {thinking_token_budget: 256}`"
            )
        return self

    @model_validator(mode="after")
    def server_is_meant(self) -> Recipe:
        if self.server.url and self.engine.sampler == "auto":
            raise ValueError(
                "server: a url alone samples nothing on it; say that answers come from the server with engine.sampler: openai "
                "(`--set engine.sampler=openai`), or take the url out (`--set server.url=null`)"
            )
        return self

    @model_validator(mode="after")
    def names_differ(self) -> Recipe:
        names = [s.name for s in self.scores]
        alike = [n.lower() for n in names]  # SQL does not see case
        twice = sorted({n for n in names if alike.count(n.lower()) > 1})
        if twice:
            called = " and ".join(repr(n) for n in twice if n.lower() == twice[0].lower())
            raise ValueError(f"scores: two entries are called {called}; give one of them its own name with `as:`")
        return self


def schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors. Shipped as curate/recipe/recipe.schema.json; a test keeps the two the same."""
    result = Recipe.model_json_schema()
    shown: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "object", "minProperties": 1, "maxProperties": 1}]}
    result["properties"]["scores"]["items"] = shown
    for key in ("source", "heldout"):
        result["properties"][key].setdefault("anyOf", []).extend(
            [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
        )
    result["$defs"].pop("ScoreRequest", None)
    result["title"] = "curate recipe"
    return result
