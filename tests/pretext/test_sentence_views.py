"""Joint embedding on texts: what tells views apart, meshes, evaluation, teachers, a run from end to end, refusals."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_step import one_step
from tiny_images import Compiled

from sslx import finetune, preview
from sslx.errors import UserError
from sslx.inference.loading import load_run, modality_of
from sslx.inference.model import load
from sslx.models.bert import BertConfig
from sslx.models.gpt import GptConfig
from sslx.models.heads import HeadConfig
from sslx.models.teacher import MomentumConfig
from sslx.pretext.byol import Byol, ByolConfig
from sslx.pretext.dino import Dino, DinoConfig
from sslx.pretext.sentence_views import DropoutViews, SentenceViews, with_deletions
from sslx.pretext.simclr import SimClr, SimClrConfig
from sslx.pretext.swav import Swav, SwavConfig
from sslx.pretext.vicreg import Vicreg, VicregConfig
from sslx.session import train
from sslx.train.checkpoint import read_variables
from sslx.train.initialise import load_encoder, objective_class, open_start
from sslx.train.metrics import read_metrics
from sslx.train.sharding import unbox
from sslx.train.step import finish_means, make_eval_step

ROWS, LENGTH = 8, 12
MODEL = BertConfig(layers=1, width=16, heads=2, mlp_width=32, max_length=16, dropout=0.2, attention_dropout=0.1)
HEAD = HeadConfig(layers=2, hidden=16, out=8)
METHODS = {
    "simclr": (SimClr, SimClrConfig(projector=HEAD)),
    "vicreg": (Vicreg, VicregConfig(projector=HEAD)),
    "byol": (Byol, ByolConfig(projector=HEAD, predictor=HEAD, momentum=MomentumConfig(0.5, 1.0))),
    "dino": (Dino, DinoConfig(prototypes=16, projector=HEAD)),
    "swav": (Swav, SwavConfig(prototypes=16, projector=HEAD)),
}


@pytest.fixture(scope="module")
def batch(packed_rows):
    """Texts of one segment each, of unequal lengths."""
    rows = packed_rows(ROWS, LENGTH, paired=True, seed=3)
    return {name: rows[name] for name in ("tokens", "segment_ids", "positions", "row")}


@pytest.fixture
def method(vocabulary):
    def make(name, model=MODEL, **views):
        cls, pretext = METHODS[name]
        source = SentenceViews(model, DropoutViews(**views), vocabulary)
        return cls(dataclasses.replace(pretext, views=source.config), source, ROWS, 10)

    return make


def fresh(objective, batch):
    """Variables that ``init`` has made, four times as large, so that what is compared is not all rounding."""
    made = jax.device_get(jax.jit(lambda: objective.init(jax.random.key(5), batch))())
    return made | {"params": jax.tree.map(lambda array: 4.0 * array, made["params"])}


def agree(expected, found):
    """Every array to 1e-4 of its largest value, but for rounding: a shift of all features has gradients of 0."""
    rounding = 1e-5 * max((np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected)), default=0.0)
    others = dict(jax.tree_util.tree_leaves_with_path(found))
    for path, value in jax.tree_util.tree_leaves_with_path(expected):
        error = np.max(np.abs(value - others[path]))
        assert error <= 1e-4 * np.max(np.abs(value)) + rounding, f"{jax.tree_util.keystr(path)}: {error}"


def seen(objective, variables, viewed, *, train, seed=0):
    """What student and teacher make of the views."""
    variables = unbox(variables)

    def represent(viewed):
        key = jax.random.key(seed)
        return objective.represent(variables["params"], variables["state"], viewed, key, 0, train=train)

    return jax.device_get(jax.jit(represent)(viewed))


@pytest.mark.parametrize(("name", "train"), [("simclr", True), ("simclr", False), ("vicreg", True)])
def test_two_views_differ_by_their_dropout_masks_alone(method, batch, name, train):
    objective = method(name)  # simclr's views go through the encoder together, vicreg's one after the other
    variables, viewed = fresh(objective, batch), Compiled(objective).views(batch, train)
    for view in viewed["views"]:
        assert set(view) == {"tokens", "segment_ids", "positions"}
        for field, array in view.items():
            np.testing.assert_array_equal(array, batch[field])
    (one, other), _ = seen(objective, variables, viewed, train=train)
    assert np.abs(one.features - other.features).max(axis=1).min() > 1e-2  # of every row
    calm = dataclasses.replace(objective, source=objective.source.undropped())
    (one, other), _ = seen(calm, variables, viewed, train=train)
    np.testing.assert_array_equal(one.features, other.features)
    assert np.abs(one.features).max() > 1e-2


@pytest.mark.parametrize("name", ["simclr", "vicreg", "byol"])
def test_losses_gradients_and_state_are_the_same_on_eight_devices(method, batch, name):
    objective = method(name, delete=0.2)
    variables = fresh(objective, batch)
    (one, metrics), (eight, others) = (one_step(objective, variables, batch, devices=n) for n in (1, 8))
    assert np.isfinite(metrics["loss"])
    assert others["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert np.abs(one.opt_state["encoder"]["embeddings"]["word"]).max() > 1e-3
    agree(one.opt_state, eight.opt_state)
    agree(one.state, eight.state)


@pytest.mark.parametrize("name", ["dino", "swav"])
def test_methods_of_crops_do_with_the_two_views_of_a_text(method, batch, name):
    objective = method(name)
    variables, viewed = fresh(objective, batch), Compiled(objective).views(batch, True)
    out = Compiled(objective).loss(*unbox(variables).values(), viewed, True)
    (term,) = out.terms.values()
    assert 0 < float(term.sum) / ROWS < 10 * objective.chance({})
    whole, part = (objective.flops({"tokens": (rows, LENGTH)}) for rows in (2 * ROWS, ROWS))
    assert whole == 2 * part > 0


def test_evaluation_has_masks_that_are_always_the_same_and_running_averages(method, batch):
    objective = method("simclr")
    variables = unbox(fresh(objective, batch))
    evaluate = jax.jit(make_eval_step(objective, seed=0))
    first = finish_means(jax.device_get(evaluate(*variables.values(), batch | {"valid": np.ones(ROWS, np.float32)})))
    # Rows that only fill up the batch change nothing.
    valid = np.float32(np.arange(ROWS) < 5)
    parts = []
    for fill in (5, 90):
        tokens = np.where(valid[:, None] > 0, batch["tokens"], fill)
        given = batch | {"tokens": tokens, "valid": valid}
        parts.append(finish_means(jax.device_get(evaluate(*variables.values(), given))))
    assert parts[0] == pytest.approx(parts[1], rel=1e-5)
    assert first["loss"] > 0.01  # of views that are the same next to nothing is left


def test_a_teacher_has_no_dropout(method, batch):
    objective = method("byol")
    variables, viewed = fresh(objective, batch), Compiled(objective).views(batch, True)
    (students, teachers), (others, again) = (seen(objective, variables, viewed, train=True, seed=n) for n in (0, 1))
    np.testing.assert_array_equal(teachers[0].projection, teachers[1].projection)
    np.testing.assert_array_equal(teachers[0].projection, again[0].projection)
    assert np.abs(students[0].projection - others[0].projection).max() > 1e-3
    expected = objective.encode({"params": unbox(variables)["state"]["teacher"]["params"]["encoder"]}, batch)
    np.testing.assert_allclose(teachers[0].features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_features_are_pooled_over_the_tokens_of_a_text(method, batch, pool):
    model = MODEL if pool != "last" else GptConfig(layers=1, width=16, heads=2, mlp_width=32, max_length=16)
    objective = method("simclr", model, pool=pool)
    variables = objective.encoder(*unbox(fresh(objective, batch)).values())
    hidden = jax.jit(lambda: objective.source.encoder().apply(variables, batch, deterministic=True))()
    real = [states[there] for states, there in zip(np.float64(hidden), batch["segment_ids"] > 0, strict=True)]
    expected = np.stack([{"mean": x.mean(0), "first": x[0], "last": x[-1]}[pool] for x in real])
    np.testing.assert_allclose(jax.jit(objective.encode)(variables, batch), expected, rtol=1e-4, atol=1e-5)


def test_deletions_leave_the_order_both_ends_and_at_least_one_token(batch):
    keys = jax.random.split(jax.random.key(0), ROWS)

    def texts(of):
        return [tokens[there].tolist() for tokens, there in zip(of["tokens"], of["segment_ids"] > 0, strict=True)]

    for share in (0.3, 0.999):
        found = jax.device_get(jax.jit(with_deletions, static_argnums=(2, 3))(batch, keys, share, 77))
        for row, (before, after) in enumerate(zip(texts(batch), texts(found), strict=True)):
            # As EDA has it: a number for each token, and those of low ones go.
            drawn = np.asarray(jax.random.uniform(keys[row], (LENGTH,)))[1 : len(before) - 1]
            stays = [token for token, number in zip(before[1:-1], drawn, strict=True) if number >= share]
            stays = stays or [before[1:-1][int(np.argmax(drawn))]]
            assert after == [before[0], *stays, before[-1]]
            length = len(after)
            assert found["positions"][row].tolist() == [*range(length), *[0] * (LENGTH - length)]
            assert found["tokens"][row, length:].tolist() == [77] * (LENGTH - length)
            assert found["segment_ids"][row].tolist() == [1] * length + [0] * (LENGTH - length)


def test_deletions_are_of_the_row_and_of_the_view(method, batch):
    compiled = Compiled(method("simclr", delete=0.4))
    one, other = (view["tokens"] for view in compiled.views(batch, True)["views"])
    assert (one != other).any()
    part = compiled.views({name: array[4:] for name, array in batch.items()}, True)["views"]
    np.testing.assert_array_equal(part[1]["tokens"], other[4:])


def test_only_deletions_make_a_variant(method, batch):
    assert method("simclr").variant(batch, jax.random.key(0)) is None
    assert method("simclr", delete=0.4).variant(batch, jax.random.key(0))["tokens"].shape == (ROWS, LENGTH)


RUN = {
    "model.layers": 1,
    "model.dropout": 0.1,
    "pretext.projector.hidden": 32,
    "pretext.projector.out": 16,
    "steps": 40,
    "optimizer.learning_rate": 3e-3,
    "eval.every_steps": 20,
    "checkpoint.every_steps": 20,
    "online.probe": True,
    "online.train_rows": 100,
    "online.eval_rows": 40,
}


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    """The folder of a small run."""
    folder = tmp_path_factory.mktemp("sentences") / "simclr"
    train(sentences(tiny_config, RUN), folder, part="pretext", tokenizer=None, title="test")
    return folder


def sentences(tiny_config, changes, name="simclr"):
    return tiny_config(name, changes, "sentences").to_dict()


def test_a_run_falls_below_chance_and_is_watched(run):
    evaluated = [record for record in read_metrics(run) if "eval/loss" in record]
    chance = math.log(2 * 16 - 1)
    assert evaluated[-1]["eval/loss"] < min(evaluated[0]["eval/loss"], chance - 1.0)
    assert all(0 <= record["eval/online_knn"] <= 1 for record in evaluated)
    assert evaluated[-1]["eval/online_knn"] > 0.3  # five modules, a fifth of the texts each
    assert "eval/online_linear" in evaluated[-1]


def test_a_run_resumes_to_the_bit(run, tiny_config, tmp_path):
    for steps in (20, 40):
        written = sentences(tiny_config, RUN | {"steps": steps, "optimizer.schedule_steps": 40})
        train(written, tmp_path / "run", part="pretext", tokenizer=None, title="test")
    jax.tree.map(np.testing.assert_array_equal, read_variables(tmp_path / "run", 40), read_variables(run, 40))


def test_a_runs_encoder_embeds_texts_and_is_fine_tuned(run, tiny_config, tmp_path):
    assert modality_of(run) == "text"
    loaded = load_run(run)
    model = load(run)
    assert model.verbs == ("embed",)
    vectors = model.embed(["add an argument", "read a member"], pool="own")
    assert vectors.shape == (2, 32)
    config = tiny_config("finetune/text_classification", {"init": str(run), "steps": 2, "optimizer.warmup_steps": 0})
    finetune.main(config, tmp_path / "run")
    assert "eval/macro_f1" in json.loads((tmp_path / "run" / "report.json").read_text())
    given = loaded.variables["params"]["encoder"]
    taken, notes = load_encoder({"encoder": jax.tree.map(jnp.asarray, given)}, open_start(tmp_path / "run"))
    changed = jax.tree.map(lambda a, b: np.abs(a - b).max(), jax.device_get(given), taken["encoder"])
    assert max(jax.tree.leaves(changed)) < 0.05  # it went on from there
    assert notes


def test_views_are_shown(tiny_config, tmp_path):
    for changes, fields in (({}, {"text", "views", "tokens"}), ({"pretext.views.delete": 0.3}, None)):
        shown = preview.main(tiny_config("simclr", changes, "sentences"), tmp_path)
        assert len(shown) == preview.ROWS
        assert set(shown[0]) == (fields or {"text", "view 1", "view 2", "tokens"})
        assert shown[0]["text"].startswith("[CLS] ")
    assert len(shown[0]["view 1"].split()) < len(shown[0]["text"].split())
    assert shown[0]["view 1"] != shown[0]["view 2"]


STILL = {"model.dropout": 0.0, "model.attention_dropout": 0.0}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("simclr", STILL, r"neither dropout nor attention_dropout .*: both views of a text would be the same"),
        ("simclr", {"pretext.views.delete": 1.0}, r"views\.delete is 1\.0; expected 0 or a probability below 1"),
        ("simclr", {"pretext.views.pool": "lost"}, r"unknown config\.pretext\.views\.pool 'lost'; did you mean 'last'"),
        ("simclr", {"data.pair_field": "other"}, r"pair_field is 'other'; views are of single texts"),
        ("simclr", {"data.seq_len": 80, "model.positions": "learned"}, r"seq_len 80 is longer than config\.model\.max"),
        ("simclr", {"model.name": "bret"}, r"unknown config\.model\.name 'bret'; did you mean 'bert'"),
        ("byol", {"micro_batches": 2}, r"micro_batches is 2; Byol normalises by all rows of a batch"),
    ],
)
def test_what_cannot_be_is_refused(tiny_config, name, changes, message):
    written = sentences(tiny_config, changes, name)
    with pytest.raises(UserError, match=message):
        objective_class(written).abstract(written)


@pytest.mark.parametrize("name", ["infomax", "ibot"])
def test_methods_that_look_at_places_of_pictures_take_no_texts(tiny_config, name):
    written, pictures = sentences(tiny_config, {}), tiny_config("simclr", {}, "sentences")
    pictures.pretext = {"name": name}
    with pytest.raises(
        UserError, match=r"config\.model\.name is 'bert', which this objective cannot use; expected vit"
    ):
        objective_class(pictures.to_dict()).abstract(pictures.to_dict() | {"data": written["data"]})


def test_views_of_pictures_are_none_of_texts(tiny_config):
    written = sentences(tiny_config, {})
    views = {"first": {"flip": 0.0}}
    with pytest.raises(UserError, match=r"unknown key config\.pretext\.views\.first; .*pool"):
        SimClr.abstract(written | {"pretext": {**written["pretext"], "views": views}})


def test_without_deletions_still_views_are_welcome_where_deletions_differ(tiny_config):
    objective, _ = SimClr.abstract(sentences(tiny_config, STILL | {"pretext.views.delete": 0.2}))
    assert objective.source.varied
    assert not objective.source.dropped


def test_a_causal_model_is_not_read_off_its_first_token(tiny_config):
    written = sentences(tiny_config, {"pretext.views.pool": "first"})
    written["model"] = tiny_config("gpt_clm").to_dict()["model"] | {"dropout": 0.1}
    with pytest.raises(UserError, match=r"config.pretext.views.pool is 'first', but the first token of a causal model"):
        SimClr.abstract(written)
    written["pretext"]["views"]["pool"] = "last"
    objective, row = SimClr.abstract(written)
    shapes = {name: (4, *leaf.shape) for name, leaf in row.items()}
    whole = dataclasses.replace(objective, source=dataclasses.replace(objective.source, config=DropoutViews()))
    assert 0 < objective.flops(shapes) < whole.flops(shapes)
