"""The recipe: which scores are wanted, over which models and checkpoints, and what to select.

Strict pydantic models of the YAML. An unknown key, a misspelt score or a bad type is an error that names the file, the line, the key and
the nearest right one. Relative paths are relative to the recipe's folder, so a recipe means the same from everywhere.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from curate.recipe.sources import Source, Target, inherit
from curate.rows import ROW_COLUMNS


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Revisions(Strict):
    """Revisions of one hub repository, as the checkpoints of a run."""

    repo: str = Field(description="owner/name")
    revisions: list[str] = Field(description="branches, tags or commits, such as step1000")


class Models(Strict):
    """The models that rows are measured with: whole models, or LoRA adapters' folders as PEFT and TRL save them."""

    reference: str | None = Field(
        None, description="a model's or LoRA adapter's folder, or a hub id (owner/name@revision)"
    )
    policy: str | None = Field(None, description="a second model: implicit rewards, flips")
    checkpoints: str | list[str] | Revisions | None = Field(
        None,
        description="a training run's folder, a list of folders and hub ids, revisions of a hub repository, or recordings:RUN",
    )
    base: str | None = Field(
        None, description="the model that LoRA adapters sit on; default: the one their adapter_config.json names"
    )
    on_broken_checkpoint: Literal["error", "skip"] = Field(
        "error", description="skip: a broken or half-written checkpoint is named and left out"
    )

    @field_validator("checkpoints", mode="before")
    @classmethod
    def whole_revisions(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if value.keys() == {"recordings"}:
            raise ValueError("a run's recordings are named in one word, without a space: recordings:RUN")
        repo, revisions = str(value.get("repo")), value.get("revisions")
        known = value.keys() == {"repo", "revisions"} and re.fullmatch(r"[\w.-]+/[\w.-]+", repo)
        if not known or not revisions or not isinstance(revisions, list):
            told = ", ".join(f"{key}: {given}" for key, given in value.items())
            raise ValueError(
                "revisions of a hub repository are {repo: owner/name, revisions: [step1000, step2000]}; found {"
                + told
                + "}"
            )
        return {"repo": repo, "revisions": [str(r) for r in revisions]}


class Gradients(Strict):
    """What a backward pass takes gradients over."""

    parameters: Literal["all", "lora"] | Annotated[int, Field(ge=1, strict=True)] = Field(
        "all",
        description="all; lora: the A and B matrices of LoRA adapters; k: the last k layers, final norm and LM head",
    )


class Tokens(Strict):
    """How rows become tokens."""

    max_length: int | None = Field(1024, ge=2, description="tokens of a row, prompt and response; null: no limit")
    truncation: Literal["keep_start", "keep_end", "drop", "error"] = Field(
        "keep_start",
        description="what a longer row loses: its end (keep_start, as TRL does), its beginning (keep_end), or itself (drop: not measured; error)",
    )
    chat: Literal["auto", "always", "never"] = Field(
        "auto",
        description="rows of plain text as messages, through the model's chat template: auto (question/answer rows, where it has one), always, never",
    )


class Engine(Strict):
    """What runs the models. A change of token_budget changes speed only, never a value's identity."""

    sampler: Literal["auto", "vllm", "openai", "transformers"] = Field(
        "auto",
        description="what samples answers; auto: vLLM where it can run the model, else transformers; openai: the server of `server`",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="what passes compute in; auto: bfloat16 on a GPU that has it, else float32"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 or mps")
    token_budget: int = Field(16384, ge=1, description="tokens of one batch; changes speed and memory, never values")
    seed: int = Field(0, description="of everything that is drawn: sampled answers, resampled rows, orders by chance")


class Server(Strict):
    """An OpenAI-compatible server, for `sampler: openai`."""

    url: str | None = Field(None, description="where it answers, with /v1: http://localhost:8000/v1")
    key_env: str = Field("OPENAI_API_KEY", description="the environment variable with its key")
    concurrency: int = Field(16, ge=1, description="requests under way at once")
    model: str | None = Field(None, description="the server's name of the model; its only one by default")
    timeout: float = Field(600.0, gt=0, description="seconds a request may take")
    retries: int = Field(5, ge=0, description="further tries of a request that failed")


class Sampling(Strict):
    """How answers are sampled and graded."""

    samples: int = Field(5, ge=1, description="answers a row")
    temperature: float = Field(0.8, ge=0, description="0: greedy")
    top_p: float = Field(0.95, gt=0, le=1, description="the share of the probability that is sampled from")
    max_new_tokens: int = Field(512, ge=1, description="tokens after which an answer is cut")
    stop: list[str] = Field([], description="texts that end an answer")
    system: str | None = Field(None, description="a system turn before every prompt")
    few_shot: str | None = Field(None, description="text put before every prompt, or a file with it")
    grader: str | dict[str, Any] = Field(
        "gsm8k",
        description="gsm8k, number, math, choice, exact, regex, or module:function of your own (docs/grading.md)",
    )
    perturb: str | None = Field(
        None,
        description="package.module:function of (prompt, answer) or (prompt, answer, row) that gives changed prompts, for limem",
    )


class Forecast(Strict):
    """The training that forecasts are about, and the short warm-up that curate runs itself where a score asks for one."""

    beta: float = Field(
        0.1,
        gt=0,
        description="DPO's β: of forecasts, of scores that set none, of trainer_args.json; not given: the one that the scores agree on",
    )
    optimizer: str | None = Field(
        None,
        description="optimizer.pt of a trainer's checkpoint, for step: adam; null: the measured checkpoint's own, else a warm-up's",
    )
    learning_rate: float = Field(1e-6, gt=0, description="the warm-up's, constant")
    warmup_steps: int = Field(30, ge=1, description="AdamW steps of the warm-up")
    warmup_rows: int = Field(32, ge=1, description="rows of each of its steps")


class ScoreRequest(Strict):
    """A score under the name that its column gets: two settings of one score live side by side under two names."""

    score: str
    params: dict[str, Any] = {}
    name: str

    @classmethod
    def read(cls, entry: Any) -> ScoreRequest:
        if isinstance(entry, ScoreRequest):
            return entry
        if isinstance(entry, str):
            score = entry
            params: dict[str, Any] = {}
        elif isinstance(entry, dict) and len(entry) == 1:
            score, params = next(iter(entry.items()))
            params = params or {}
        elif isinstance(entry, dict) and "score" in entry:
            score, params = (
                entry["score"],
                {**entry.get("params", {}), **({"as": entry["name"]} if "name" in entry else {})},
            )
        else:
            raise ValueError("a score is a name, or a name with its settings: `flip_loss: {beta: 0.1}`")
        if not isinstance(score, str) or not isinstance(params, dict):
            raise ValueError("a score is a name, or a name with its settings: `flip_loss: {beta: 0.1}`")
        params = dict(params)
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


class Keep(Strict):
    """How many of the rows that are left: exactly one of the three."""

    share: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="of the rows that are left")
    rows: Annotated[int, Field(ge=0)] | None = Field(None, description="at most so many")
    tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="as many rows as fit into so many tokens")

    @model_validator(mode="after")
    def one(self) -> Keep:
        given = [key for key in ("share", "rows", "tokens") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"keep takes exactly one of share, rows, tokens; found {', '.join(given) or 'none'}")
        return self

    @property
    def given(self) -> dict[str, float]:
        """The one that is given, by its name."""
        return {key: value for key in ("share", "rows", "tokens") if (value := getattr(self, key)) is not None}


class Worst(Strict):
    """A share from the end of a column that the recipe calls bad."""

    share: float = Field(ge=0, lt=1, description="of the rows that `where` left")
    worst: Literal["high", "low"] = Field(description="which end of the column is bad")


class Select(Strict):
    """Which rows are kept: exclude, then where, then drop_worst, then order_by, then keep (in every group of `per`)."""

    exclude: Literal["heldout"] | None = Field(
        None, description="heldout: no row whose prompt is in the recipe's held-out set"
    )
    where: str | None = Field(
        None, description="SQL over the view `scored` of this recipe; a row stays where it is true"
    )
    drop_worst: dict[str, Annotated[float, Field(ge=0, lt=1)] | Worst] = Field(
        {},
        description="score: share; or, for a column whose worst end nobody has said, column: {share: 0.1, worst: low}",
    )
    order_by: str | None = Field(None, description="SQL, such as `flip_loss desc`; or: random")
    keep: Keep | None = None
    per: str | dict[str, dict[str, Annotated[float, Field(ge=0, le=1)] | Keep]] | None = Field(
        None, description="a column; or {column: {group: share, other: {rows: 100}, third: {tokens: 5000}}}"
    )
    duplicates: Literal["once", "as_found"] = Field(
        "once", description="once: a row that occurs several times counts once; as_found: as often as it occurs"
    )
    unknown: Literal["error", "keep", "drop"] = Field(
        "error", description="rows where a value that a rule uses is NULL: error, keep them, or drop them"
    )
    control: Literal["random", "length_matched"] | None = Field(
        None, description="a second selection, <name>_control: as many rows, drawn from those that `where` leaves"
    )
    seed: int | None = Field(None, description="of `order_by: random` and `control`; default: engine.seed")

    @property
    def is_random(self) -> bool:
        words = re.split(r"[\s,]+", (self.order_by or "").lower())
        return self.control is not None or "random" in words

    @property
    def budgets(self) -> str | dict[str, dict[str, float | dict[str, float]]] | None:
        """`per`, with each group's budget by its name."""
        if not isinstance(self.per, dict):
            return self.per
        return {
            column: {group: b.given if isinstance(b, Keep) else b for group, b in named.items()}
            for column, named in self.per.items()
        }

    def settings(self) -> dict[str, Any]:
        """What tells this selection from another of the same rows and scores. A key that is newer than a store is not in it where it is unset."""
        new = ("exclude", "control", "seed")
        given = {key: value for key, value in self.model_dump().items() if key not in new or value is not None}
        asks = any("select" in (text or "").lower() for text in (self.where, self.order_by))
        return {**given, "sees": "the recipe's rows"} if asks else given

    @model_validator(mode="after")
    def seed_of_something(self) -> Select:
        if self.seed is not None and not self.is_random:
            raise ValueError("select.seed is of `order_by: random` and `control`; nothing here is random")
        return self

    @field_validator("per", mode="after")
    @classmethod
    def one_group(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) != 1:
            raise ValueError(f"per takes one column; found {', '.join(value)}")
        return value

    @field_validator("per", mode="before")
    @classmethod
    def text_keys(cls, value: Any) -> Any:
        """YAML reads `1: 0.5` with a number for a key, `true:` with a truth value; a group's name is text, as SQL writes it."""
        if isinstance(value, dict):
            return {
                k: {_group_name(g): s for g, s in v.items()} if isinstance(v, dict) else v for k, v in value.items()
            }
        return value


def _group_name(group: Any) -> str:
    if group is None:
        return "NULL"  # rows without a group
    return str(group).lower() if isinstance(group, bool) else str(group)


class Export(Strict):
    """Where the kept rows go, as a dataset to train on."""

    to: str = Field(description="the dataset's folder")
    format: Literal["trl", "prompt_completion", "messages", "extend"] = Field(
        "trl", description="extend: both responses of every pair as prompt/completion rows, for SFT before DPO"
    )
    columns: Literal["scores", "none"] | list[str] = Field(
        "none", description="extra columns: every score, none, or a list"
    )
    weight: str | None = Field(None, description="a column of `scored` that becomes the column `weight`")
    resample: int | None = Field(
        None, ge=1, description="so many rows, drawn in proportion to their weight (TRL's trainers take no weights)"
    )
    push_to_hub: str | None = Field(None, description="also to this hub dataset")
    control: bool = Field(False, description="also the control of `select.control`, to <to>_control")

    @model_validator(mode="after")
    def resampling_needs_weights(self) -> Export:
        if self.resample and not self.weight:
            raise ValueError(
                "export.resample draws rows in proportion to their weight: say which column that is with export.weight"
            )
        return self


class Recipe(Strict):
    """One recipe: the whole of what a run does."""

    kind: Literal["preference", "sft"] = Field(description="what a row is: a preference pair, or an SFT example")
    store: str | None = Field(None, description="the store's folder; default: `store` beside the recipe")
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
    targets: dict[Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")], Target] = {}
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
        if self.export is not None and self.export.control and (self.select is None or self.select.control is None):
            raise ValueError("export.control needs `select.control`, which says how the control is drawn")
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
