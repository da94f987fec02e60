"""The recipe's sections about models and how they are run: `models`, `gradients`, `tokens`, `engine`, `server`, `sampling`, `forecast`."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from curate.recipe.doors import PathText, address
from curate.rows import RESERVED_SETTINGS

OWN_ARGUMENTS = {  # of a server's requests -> the key of the recipe that says it
    **{
        key: f"sampling.{key}"
        for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "chat_template_kwargs")
    },
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), "sampling.max_new_tokens"),
    "n": "sampling.samples",
    "seed": "engine.seed",
    "model": "server.model",
    **dict.fromkeys(("messages", "prompt", "tools"), "the row's own"),
    **dict.fromkeys(("logprobs", "stream"), "what every request needs"),
}


class Strict(BaseModel):
    """A section. later: keys that recipes did not have at first; stores know nothing of them where they are not set."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    later: ClassVar[frozenset[str]] = frozenset()

    def settings(self) -> dict[str, Any]:
        """The section as stores know it: `later` keys only where they are not their defaults."""
        unset = {key for key in self.later if getattr(self, key) == type(self).model_fields[key].default}
        return self.model_dump(mode="json", exclude=unset)


class Revisions(Strict):
    """Revisions of one hub repository, as the checkpoints of a run."""

    repo: str = Field(description="owner/name")
    revisions: list[str] = Field(description="branches, tags or commits, such as step1000")


class Models(Strict):
    """The models that rows are measured with: whole models, or LoRA adapters' folders as PEFT and TRL save them."""

    reference: PathText | None = Field(
        None, description="a model's or LoRA adapter's folder, or a hub id (owner/name@revision)"
    )
    policy: PathText | None = Field(None, description="a second model: implicit rewards, flips")
    checkpoints: PathText | list[PathText] | Revisions | None = Field(
        None,
        description="a training run's folder, a list of folders and hub ids, revisions of a hub repository, or recordings:RUN",
    )
    base: PathText | None = Field(
        None, description="the model that LoRA adapters sit on; default: the one their adapter_config.json names"
    )
    allow_pickle: bool = Field(
        False,
        description="true: weights that are pickles (pytorch_model.bin) are read, as tensors alone; safetensors need no leave",
    )
    trust_remote_code: bool = Field(
        False,
        description="true: Python code that a model's folder brings (auto_map in its config.json) is run; read it first",
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
            listed = ", ".join(f"{key}: {given}" for key, given in value.items())
            raise ValueError(
                f"revisions of a hub repository are {{repo: owner/name, revisions: [step1000, step2000]}}; found {{{listed}}}"
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
    turns: Literal["last", "all"] = Field(
        "last",
        description="which of an SFT conversation's assistant turns are measured: its last, or all as one completion (TRL's assistant_only_loss)",
    )
    later = frozenset({"turns"})


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

    url: Annotated[str, AfterValidator(address)] | None = Field(
        None, description="where it answers, with /v1: http://localhost:8000/v1"
    )
    key_env: str = Field("OPENAI_API_KEY", description="the environment variable with its key")
    concurrency: int = Field(16, ge=1, description="requests under way at once")
    model: str | None = Field(None, description="the server's name of the model; its only one by default")
    timeout: float = Field(600.0, gt=0, description="seconds a request may take")
    retries: int = Field(5, ge=0, description="further tries of a request that failed")


class Adaptive(Strict):
    """As many answers a row as decide its band: looked at after `from`, twice that, … up to `to` (docs/rlvr.md)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True)

    least: int = Field(alias="from", ge=1, description="answers that every row gets")
    to: int = Field(ge=2, description="answers that a row gets at most")
    until: Literal["band"] = Field(
        "band", description="band: a row stops when the 95% interval of its pass rate crosses no end of the band"
    )
    band: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.2, 0.8],
        min_length=2,
        max_length=2,
        description="low and high, both in it; `pass_band` takes it too where it says none",
    )

    @model_validator(mode="after")
    def goes_up(self) -> Adaptive:
        if self.least >= self.to:
            raise ValueError(
                f"samples: from is {self.least} and to {self.to}; a row starts with fewer answers than it gets at most"
            )
        if self.band[0] >= self.band[1]:
            raise ValueError(f"samples.band: {self.band} should go from low to high")
        return self


class Sampling(Strict):
    """How answers are sampled and graded."""

    samples: Annotated[int, Field(ge=1)] | Adaptive = Field(
        5, description="answers a row; or {from: 4, to: 32, until: band}: of each row as many as decide its band"
    )
    temperature: float = Field(0.8, ge=0, description="0: greedy")
    top_p: float = Field(0.95, gt=0, le=1, description="the share of the probability that is sampled from")
    top_k: int | None = Field(None, ge=1, description="only the so many likeliest tokens are sampled from")
    min_p: float | None = Field(
        None, gt=0, le=1, description="only tokens of at least this share of the likeliest one's probability are"
    )
    repetition_penalty: float | None = Field(
        None, gt=0, description="above 1: tokens that the prompt or the answer has already are made less likely"
    )
    max_new_tokens: int = Field(512, ge=1, description="tokens after which an answer is cut, its thinking among them")
    thinking_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens after which a model that still thinks has to answer, with the rest of max_new_tokens; a server's: in extra_body",
    )
    stop: list[str] = Field([], description="texts that end an answer")
    system: str | None = Field(None, description="a system turn before every prompt")
    few_shot: str | None = Field(None, description="text put before every prompt, or a file with it")
    grader: str | dict[str, Any] = Field(
        "gsm8k",
        description="gsm8k, number, math, choice, exact, regex, or module:function of your own (docs/grading.md)",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        description="settings of the chat template for every prompt, such as {enable_thinking: false}; a row's own count more",
    )
    extra_body: dict[str, Any] = Field(
        {}, description="further arguments of requests to the server of `server`, such as {thinking_token_budget: 256}"
    )
    thinking_tags: Literal["auto"] | Annotated[list[str], Field(min_length=2, max_length=2)] | None = Field(
        "auto",
        description="what opens and closes a model's thinking, ['<think>', '</think>'], so that graders see the answer alone; auto: by its chat "
        "template and vocabulary; null: all of a text is the answer",
    )
    unfinished: Literal["wrong", "leave_out"] = Field(
        "wrong",
        description="what samples count as that were cut before they gave an answer, such as in their thinking: wrong, or left out of n_samples",
    )
    perturb: str | None = Field(
        None,
        description="package.module:function of (prompt, answer) or (prompt, answer, row) that gives changed prompts, for limem",
    )
    later = frozenset(
        {
            *("thinking_tags", "unfinished", "top_k", "min_p", "repetition_penalty", "thinking_tokens"),
            *("chat_template_kwargs", "extra_body"),
        }
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def settings_of_a_template(cls, value: dict[str, Any]) -> dict[str, Any]:
        if ours := sorted(RESERVED_SETTINGS & value.keys()):
            raise ValueError(
                f"{ours[0]!r} is not a setting of a chat template; system turns, tools and texts have keys of their own"
            )
        return value

    @field_validator("extra_body")
    @classmethod
    def arguments_of_a_server(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in sorted(OWN_ARGUMENTS.keys() & value.keys()):
            raise ValueError(f"{key!r} is sent already, as {OWN_ARGUMENTS[key]}; set that instead")
        return value

    @model_validator(mode="after")
    def thinks_before_it_answers(self) -> Sampling:
        if self.thinking_tokens is not None and self.thinking_tokens >= self.max_new_tokens:
            raise ValueError(
                f"thinking_tokens ({self.thinking_tokens}) has to be below max_new_tokens ({self.max_new_tokens}): the rest is for the answer"
            )
        if self.thinking_tokens is not None and self.thinking_tags is None:
            raise ValueError("thinking_tokens needs thinking_tags, which say where a model's thinking ends")
        return self

    @field_validator("thinking_tags")
    @classmethod
    def tags_differ(cls, value: Any) -> Any:
        if isinstance(value, list) and (not all(tag.strip() for tag in value) or value[0] == value[1]):
            raise ValueError(
                "the opening and the closing tag are two texts that differ, such as ['<think>', '</think>']"
            )
        return value

    @property
    def least(self) -> int:
        """Answers that every row gets."""
        return self.samples if isinstance(self.samples, int) else self.samples.least

    @property
    def most(self) -> int:
        """Answers that a row gets at most."""
        return self.samples if isinstance(self.samples, int) else self.samples.to

    @model_validator(mode="after")
    def can_be_told_apart(self) -> Sampling:
        if isinstance(self.samples, int):
            return self
        if self.temperature == 0:
            raise ValueError("sampling.samples: at temperature 0 all answers are the same; a number of them is enough")
        if self.perturb is not None:
            raise ValueError(
                "sampling.samples: with sampling.perturb it is a number, the same for a row and its perturbations"
            )
        return self


class Forecast(Strict):
    """The training that forecasts are about, and the short warm-up that curate runs itself where a score asks for one."""

    beta: float = Field(
        0.1,
        gt=0,
        description="DPO's β: of forecasts, of scores that set none, of trainer_args.json; not given: the one that the scores agree on",
    )
    optimizer: PathText | None = Field(
        None,
        description="optimizer.pt of a trainer's checkpoint, for step: adam; null: the measured checkpoint's own, else a warm-up's",
    )
    learning_rate: float = Field(1e-6, gt=0, description="the warm-up's, constant")
    warmup_steps: int = Field(30, ge=1, description="AdamW steps of the warm-up")
    warmup_rows: int = Field(32, ge=1, description="rows of each of its steps")
