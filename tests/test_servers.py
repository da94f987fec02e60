"""Whose values a server's are: other weights at the same URL are another model, the same weights at another URL are not."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
import yaml

pytest.importorskip("openai")

import curate
from curate.console import Progress
from curate.errors import EngineError, UsageError, ValidationError
from curate.passes.sampling.server_probe import Noise, Spoken, difference, measured_noise
from curate.recipe.load import load_recipe
from curate.store.entries import Measured
from curate.workflow.run import make_plan, run_steps
from tests.served import Served
from tests.tiny_models import make_llama

ROWS = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}", "answer": "one"} for i in range(6)]


def write(folder, url, rows=ROWS, **over):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "kind": "sft",
        "source": "rows.jsonl",
        "engine": {"sampler": "openai", "device": "cpu"},
        "server": {"url": url, "retries": 0},
        "sampling": {"samples": 2, "max_new_tokens": 8, "grader": {"regex": "(one)"}},
        "scores": ["accuracy"],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw | over))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def of_a(tmp_path_factory):
    """A folder in which a server with the weights `a` was measured; it is gone since."""
    folder = tmp_path_factory.mktemp("of_a")
    with Served("a") as server:
        curate.run(write(folder, server.url))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("models") / "model", seed=1)


@pytest.fixture
def known(of_a, tmp_path):
    """known(a server's url, **over the recipe's keys): a recipe over that store, at another address."""

    def known(url, **over):
        shutil.copytree(of_a / "store", tmp_path / "store")
        return write(tmp_path, url, **over)

    return known


def plan_of(path, **more):
    return make_plan(load_recipe(path, **more), progress=Progress(quiet=True))


def texts(store):
    return store.sql("SELECT text FROM samples ORDER BY row_id, sample")["text"].to_list()


def test_other_weights_at_the_same_url_are_measured_under_their_own_identity(tmp_path):
    with Served("a") as server:
        path = write(tmp_path, server.url)
        first = curate.run(path)
        assert first.measured["sample"] == 6 and "new to this store" in first.plan.notes()[0]
        again = plan_of(path)  # `created` is another by now, as it is of vLLM at every request
        assert "Everything is measured already." in again.text()
        assert "the model that was measured here before" in again.text()
        answers = texts(first.store)
        server.weights = "b"
        other = plan_of(path)
        assert other.missing == 6 and "another model than was measured here before" in other.text()
        second = curate.run(path)
        assert second.measured["sample"] == 6 and texts(second.store) != answers
        server.weights = "a"  # and back: the first policy's values are still known
        assert plan_of(path).missing == 0 and curate.run(path).measured == {}
        assert texts(second.store) == answers


def test_another_name_root_or_context_is_another_model(tmp_path):
    with Served("a") as server:
        path = write(tmp_path, server.url)
        curate.run(path)
        for key, value in (("id", "other"), ("root", "/models/step-200"), ("max_model_len", 128)):
            before = server.models[0]
            server.models[0] = before | {key: value}
            plan = plan_of(path)
            assert plan.missing == 6 and f"{'model' if key == 'id' else key} was" in plan.text()
            server.models[0] = before


def test_the_same_weights_at_another_url_are_known(known):
    with Served("a") as two, Served("b") as third:
        path = known(two.url)
        two.noise = 2e-4
        assert plan_of(path).missing == 0
        assert plan_of(path, set={"server.url": third.url}).missing == 6


def test_a_server_without_logprobs_or_version_is_told_by_its_texts(tmp_path):
    with Served("a", logprobs=False, version=None) as server:
        path = write(tmp_path, server.url)
        curate.run(path)
        assert plan_of(path).missing == 0
        server.weights = "b"
        assert plan_of(path).missing == 6


def test_a_server_that_never_repeats_itself_is_known_by_name_and_that_is_said(tmp_path):
    with Served("0") as server:
        server.after = lambda s: setattr(s, "weights", s.weights + "!")
        path = write(tmp_path, server.url)
        assert any("known by its name alone" in note for note in curate.run(path).plan.notes())
        assert plan_of(path).missing == 0


def test_a_server_that_changes_while_it_samples_leaves_nothing_under_the_old_identity(tmp_path):
    with Served("a") as server:
        path = write(tmp_path, server.url)

        def restarted(s):
            if len(s.sampled) == 3:
                s.weights = "b"

        server.after = restarted
        with pytest.raises(EngineError, match="another model now than when this run was planned"):
            curate.run(path)
        store = curate.Store(tmp_path / "store")
        assert not store.measured(reads="sample")
        server.after = None
        assert curate.run(path).measured["sample"] == 6
        server.weights = "a"
        assert plan_of(path).missing == 6  # not one value of the mixed run was kept as the first model's


def test_steps_that_need_no_server_do_not_ask_it(known):
    with Served("a") as server:
        path = known(server.url, select={"keep": {"rows": 3}})
        assert curate.run(path).measured == {}
        asked = len(server.requests)
        for command in ("score", "select"):
            run_steps(load_recipe(path), (command,), progress=Progress(quiet=True), command=command)
        assert len(server.requests) == asked
    with pytest.raises(EngineError, match="no server reached"):
        plan_of(path)


def test_a_store_of_before_is_measured_again_and_that_is_said(tmp_path):
    with Served("a") as server:
        path = write(tmp_path, server.url)
        store = curate.Store(tmp_path / "store", create=True)
        store.remember([Measured("0" * 20, "accuracy", "sample", "m", "w", engine=f"openai {server.url} m")])
        plan = plan_of(path)
        assert plan.missing == 6 and any("known by its address alone" in note for note in plan.notes())


def test_a_model_of_the_recipe_must_be_the_one_that_is_served(tmp_path, model):
    other = make_llama(tmp_path / "other-model", seed=2)
    with Served(models=[{"id": "other-model", "root": "other-model"}]) as server:
        path = write(tmp_path, server.url, models={"reference": str(model)})
        with pytest.raises(UsageError, match=r"recipe's model is model .* serves other-model") as error:
            plan_of(path)
        assert "server.model=other-model" in str(error.value)
        said = plan_of(path, set={"server.model": "other-model"}).notes()
        assert any("because server.model says so" in note for note in said)
        server.models = [{"id": "model", "root": str(other)}]  # an alias: the weights behind it can be read here
        with pytest.raises(UsageError, match="whose weights are others than those of model"):
            plan_of(path)
        server.models = [{"id": "alias", "root": str(model)}]
        assert not any("taken" in note for note in plan_of(path).notes())
        server.models = [{"id": "hub/model"}, {"id": "hub/another"}]  # of several, the recipe's is meant
        assert any("taken from its name" in note for note in plan_of(path).notes())


@pytest.mark.parametrize(
    ("path", "sent", "says"),
    [
        ("/v1/models", (200, "text/html", "<html>hello</html>"), "wanted a list of models.*text/html.*hello"),
        ("/v1/models", (200, "application/json", '{"data": 3}'), "wanted a list of models"),
        ("/v1/models", (401, "application/json", "{}"), "KEY_OF_THE_TEST is not set"),
        ("/v1/models", (404, "application/json", "{}"), "no list of models.*server.model"),
        ("/v1/models", (500, "application/json", "{}"), "failed at the first attempt"),
        ("/v1/completions", (200, "text/html", "<html>hello</html>"), "without any choice.*hello"),
        ("/v1/completions", (500, "application/json", '{"error": "out of memory"}'), "out of memory"),
        ("/v1/completions", (401, "application/json", "{}"), "KEY_OF_THE_TEST is not set"),
    ],
)
def test_a_plan_says_what_is_wrong_with_a_server(tmp_path, path, sent, says):
    with Served() as server:
        server.broken[path] = sent
        recipe = write(tmp_path, server.url)
        with pytest.raises(EngineError, match=says):
            plan_of(recipe, set={"server.key_env": "KEY_OF_THE_TEST"})


def test_a_server_that_has_no_chat_is_said_by_the_plan_of_conversations(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "1"}], "answer": "one"}
        for i in range(3)
    ]
    with Served() as server:
        path = write(tmp_path, server.url, rows)
        assert plan_of(path).missing == 3
        server.broken["/v1/chat/completions"] = (400, "application/json", '{"error": "no chat template"}')
        with pytest.raises(EngineError, match="no chat template"):
            plan_of(path)


def test_a_recipe_that_samples_nothing_needs_no_server(tmp_path, model):
    path = write(tmp_path, None, models={"reference": str(model)}, scores=["target_nll"])
    assert curate.run(path).measured == {"tokens": 6, "forward": 6}


def test_nobody_there_is_said_at_once(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        path = write(tmp_path, f"http://127.0.0.1:{free.getsockname()[1]}/v1")
        with pytest.raises(EngineError, match="no server reached"):
            plan_of(path)


# (before, now, measured noise, the same weights?): tokens with log-probabilities
CASES = [
    ("ab", [-0.1, -0.2], "ab", [-0.1, -0.2], 0, True),
    ("ab", [-0.1, -0.2], "ab", [-0.1005, -0.2], 0, True),  # float32 in another batch
    ("ab", [-0.1, -0.2], "ab", [-0.15, -0.2], 0, False),
    ("ab", [-0.1, -0.2], "ab", [-0.15, -0.2], 0.05, True),  # of a server that is as noisy as that
    ("ab", [-0.1, -0.2], "ac", [-0.1, -0.2], 0.05, False),  # 0.82 of the probability: no noise takes another
    ("ab", [-0.1, -0.70], "ac", [-0.1, -0.7], 0, True),  # a tie
    ("abx", [-0.1, -0.70, -3], "acy", [-0.1, -0.7, -1], 0, True),  # after which the answers go their own ways
    ("ab", [-0.1, -0.70], "ac", [-0.1, -0.9], 0, False),
    ("ab", [-0.1, -0.2], "a", [-0.1], 0, False),  # ended earlier
    ("ab", None, "ab", None, 0, True),
    ("ab", None, "ac", None, 0, False),
]


@pytest.mark.parametrize(("before", "logps", "now", "now_logps", "noise", "same"), CASES)
def test_what_counts_as_noise(before, logps, now, now_logps, noise, same):
    one, other = (
        {"p": Spoken(tuple(text), None if found is None else tuple(found))}
        for text, found in ((before, logps), (now, now_logps))
    )
    assert (difference(one, other, Noise(noise, noise)) is None) is same


def test_noise_is_measured_on_what_is_repeated():
    one = {"p": Spoken(("a", "b"), (-0.1, -0.2)), "q": Spoken(("x",)), "r": Spoken(("y",))}
    two = {"p": Spoken(("a", "b"), (-0.1, -0.26)), "q": Spoken(("x",)), "r": Spoken(("z",))}
    kept, noise = measured_noise(one, two)
    assert kept.keys() == {"p", "q"} and (noise.mean, noise.most) == pytest.approx((0.03, 0.06))


def test_a_label_is_no_proof_of_another_model_and_that_is_said_even_quietly(tmp_path, model, capsys):
    """A server that gives neither root nor log-probabilities: whether its model is the recipe's cannot be told."""
    with Served(models=[{"id": "tiny"}], logprobs=False, version=None) as server:
        path = write(tmp_path, server.url, models={"reference": str(model)})
        run_steps(load_recipe(path), ("measure",), progress=Progress(quiet=True), command="measure")
        said = capsys.readouterr().err
        assert "calls its model tiny" in said and "server.model=tiny" in said
        assert not plan_of(path, set={"server.model": "tiny"}).doubts


def test_a_server_that_fails_on_some_prompts_is_known_by_the_others(tmp_path):
    with Served("a") as server:
        server.refuses = lambda prompt: "plus" not in prompt
        path = write(tmp_path, server.url)
        assert curate.run(path).measured["sample"] == 6 and plan_of(path).missing == 0
        server.weights = "b"
        assert plan_of(path).missing == 6
        server.refuses = lambda prompt: True
        with pytest.raises(EngineError):
            plan_of(path)


def test_sources_of_several_formats_are_asked_alike_where_a_server_is_all_there_is(tmp_path):
    """Nothing would be asked as a chat, so there is nothing to decide."""
    (tmp_path / "questions.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(3))
    )
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {i}", "completion": f" {i}"}) + "\n" for i in range(3))
    )
    with Served() as server:
        given = {
            "kind": "sft",
            "source": [str(tmp_path / "questions.jsonl"), str(tmp_path / "texts.jsonl")],
            "store": str(tmp_path / "store"),
            "engine": {"sampler": "openai"},
            "server": {"url": server.url},
            "sampling": {"samples": 1, "max_new_tokens": 4, "grader": "number"},
            "scores": ["accuracy"],
        }
        told = make_plan(load_recipe(given), progress=Progress(quiet=True)).text()
        assert "asked as plain text" in told and "3 of 6 rows have no answer" in told
        assert curate.run(given).measured == {"sample": 6}
        (tmp_path / "alone.jsonl").write_text('{"prompt": "say 1"}\n')
        with pytest.raises(ValidationError, match="A prompt alone is neither measured nor graded"):
            make_plan(load_recipe({**given, "source": str(tmp_path / "alone.jsonl")}), progress=Progress(quiet=True))
