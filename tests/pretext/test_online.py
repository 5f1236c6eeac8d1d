"""Features watched while a pretext task trains: the classifier and the votes by NumPy, and that nothing else moves."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_step import assert_close, one_step
from tiny_images import TINY_VIT, picture_rows, tiny_images

from sslx import main
from sslx.data.batches import SomeRows
from sslx.errors import UserError
from sslx.inference.loading import load_run
from sslx.models.resnet import ResnetConfig
from sslx.pretext.mae import Mae, MaeConfig
from sslx.pretext.online import Watched
from sslx.pretext.rotation import Rotation, RotationConfig
from sslx.probing.features import Encoder
from sslx.session import check_run, train
from sslx.settings import OnlineConfig
from sslx.train.checkpoint import read_variables
from sslx.train.initialise import load_encoder, open_start
from sslx.train.metrics import read_metrics
from sslx.train.run_folder import resolve
from sslx.train.sharding import unbox
from sslx.train.step import TrainState, make_eval_step, make_train_step

MAE = Mae(MaeConfig(decoder_layers=1, decoder_width=16, decoder_heads=2), TINY_VIT, False)
RESNET = Rotation(RotationConfig(), ResnetConfig(depth=10, width=2, stem="cifar", image_size=8), False)
CLASSES, RATE = 3, 0.01


def watched(objective, one_in=2):
    return Watched(objective, OnlineConfig(True, RATE, one_in, 24, 8), CLASSES)


def labelled_rows(rows, seed=0):
    batch = picture_rows(rows, seed=seed)
    return batch | {"label": (batch["image"].mean((1, 2, 3)) * 7).astype(np.int32) % CLASSES}


def steps(objective, count, micro_batches=1):
    """States and metrics of some steps with an optimizer that clips, from the same parameters."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2))
    step = jax.jit(make_train_step(objective, optimizer, lambda step: 1e-2, seed=3, micro_batches=micro_batches))
    variables = unbox(jax.jit(lambda: objective.init(jax.random.key(0), labelled_rows(2)))())
    state = TrainState(jnp.int32(0), variables["params"], variables["state"], optimizer.init(variables["params"]))
    states, metrics = [state], []
    for number in range(count):
        state, found = step(state, labelled_rows(16, seed=number))
        states.append(state)
        metrics.append(jax.device_get(found))
    return states, metrics


@pytest.mark.parametrize(("objective", "micro_batches"), [(MAE, 1), (MAE, 2), (RESNET, 1)], ids=["mae", "micro", "bn"])
def test_what_is_pretrained_is_bit_equal_with_and_without(objective, micro_batches):
    (alone, numbers), (beside, others) = (steps(of, 3, micro_batches) for of in (objective, watched(objective)))
    for one, other in zip(alone, beside, strict=True):
        same(one.params, other.params)
        same(one.opt_state, other.opt_state)
        same(one.state, {name: part for name, part in other.state.items() if name != "online"})
    for one, other in zip(numbers, others, strict=True):
        assert 0 <= other.pop("online_linear") <= 1
        assert one == other
    assert np.abs(beside[-1].state["online"]["head"]["kernel"]).max() > 0


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_classifier_is_adam_on_standardised_features():
    objective = watched(MAE)
    states, metrics = steps(objective, 4)
    encode = jax.jit(objective.encode)
    mean, variance = np.zeros(16), np.ones(16)
    head = {"kernel": np.zeros((16, CLASSES)), "bias": np.zeros(CLASSES)}
    first, second = ({name: np.zeros_like(of) for name, of in head.items()} for _ in range(2))
    for number in range(4):
        batch = {name: array[::2] for name, array in labelled_rows(16, seed=number).items()}  # one row in two
        # Of the pictures as they are, by the encoder as it is before the update.
        features = np.float64(encode(objective.encoder(states[number].params, {}), {"image": batch["image"]}))
        x = (features - mean) / np.sqrt(variance + 1e-6)
        logits = x @ head["kernel"] + head["bias"]
        assert metrics[number]["online_linear"] == pytest.approx((logits.argmax(-1) == batch["label"]).mean())
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        error = (shares - np.eye(CLASSES)[batch["label"]]) / 8
        for name, gradient in {"kernel": x.T @ error, "bias": error.sum(0)}.items():
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            unbiased = [first[name] / (1 - 0.9 ** (number + 1)), second[name] / (1 - 0.999 ** (number + 1))]
            head[name] -= RATE * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
        # The averages of few batches are those of all their rows.
        kept = number / (number + 1)
        moved = kept * mean + (1 - kept) * features.mean(0)
        variance = kept * (variance + mean**2) + (1 - kept) * (features**2).mean(0) - moved**2
        mean = moved
        own = states[number + 1].state["online"]
        np.testing.assert_allclose(own["mean"], mean, atol=1e-5)
        np.testing.assert_allclose(own["variance"], variance, rtol=2e-2)
        np.testing.assert_allclose(own["head"]["bias"], head["bias"], atol=1e-3)
        np.testing.assert_allclose(own["head"]["kernel"], head["kernel"], atol=1e-3)


def test_the_classifier_is_the_same_on_eight_devices_and_from_micro_batches():
    objective = watched(MAE, one_in=1)
    variables = jax.device_get(jax.jit(lambda: objective.init(jax.random.key(5), labelled_rows(2)))())
    one, eight, split = (
        one_step(objective, variables, labelled_rows(16), devices=devices, micro_batches=parts)[0].state["online"]
        for devices, parts in ((1, 1), (8, 1), (1, 2))
    )
    assert np.abs(one["head"]["kernel"]).max() > 0
    for other in (eight, split):
        assert_close(one["mean"], other["mean"])
        assert_close(one["optimizer"][0].mu, other["optimizer"][0].mu, share=1e-3)


def test_filled_up_rows_do_not_count_in_evaluation():
    objective = watched(MAE)
    state = steps(objective, 2)[0][-1]
    evaluate = jax.jit(make_eval_step(objective, seed=0))
    batch = labelled_rows(8)
    part = evaluate(state.params, state.state, batch | {"valid": np.float32(np.arange(8) < 5)})["online_linear"]
    first = {name: of[:5] for name, of in batch.items()}
    alone = evaluate(state.params, state.state, first | {"valid": np.ones(5, np.float32)})["online_linear"]
    assert (part.sum, part.weight) == (alone.sum, alone.weight)
    assert part.weight == 5


RUN = dict(
    pretext__decoder_layers=1,
    pretext__decoder_width=32,
    steps=12,
    eval__every_steps=6,
    checkpoint__every_steps=6,
    checkpoint__best_metric="eval/online_knn",
    checkpoint__best_mode="max",
    online__probe=True,
    online__train_rows=150,
    online__eval_rows=70,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online") / "run"
    return main.main(tiny_images("vit_mae", **RUN), folder), folder


def test_votes_are_those_of_training_rows_by_numpy(whole):
    session, folder = whole
    run = load_run(folder)
    assert isinstance(run.objective, Mae)  # what comes after knows nothing of it
    data, encoder = session.data, Encoder(run.objective.encode, 64)
    frozen = run.objective.encoder(run.variables["params"], run.variables["state"])
    bank, held = (encoder(frozen, SomeRows(rows, n, 0)) for rows, n in ((data.train, 150), (data.eval, 70)))
    unit = [np.float64(of.features) / np.linalg.norm(of.features, axis=1, keepdims=True) for of in (bank, held)]
    similarity, right = unit[1] @ unit[0].T, 0
    for row, label in zip(similarity, held.labels, strict=True):
        near = np.argsort(-row)[:20]
        right += np.bincount(bank.labels[near], np.exp(row[near] / 0.07), 10).argmax() == label
    assert session.trained.metrics["eval/online_knn"] == pytest.approx(right / 70, abs=0.03)
    assert right / 70 > 0.15  # a guess reaches 0.1


def test_a_run_reports_both_and_resumes_to_the_bit(whole, tmp_path):
    _, folder = whole
    changes = RUN | {"steps": 6}
    for number in (6, 12):
        config = tiny_images("vit_mae", **changes | {"steps": number, "optimizer__schedule_steps": 12})
        train(config.to_dict(), tmp_path / "run", part="pretext", tokenizer=None, title="test")
    same(read_variables(tmp_path / "run", 12), read_variables(folder, 12))
    records = [record for record in read_metrics(folder) if "eval/online_knn" in record]
    assert [record["step"] for record in records] == [6, 12]
    assert [r["eval/online_linear"] for r in read_metrics(tmp_path / "run") if "eval/online_knn" in r] == [
        record["eval/online_linear"] for record in records
    ]


def test_a_run_starts_others_as_if_it_had_not_been_watched(whole, tmp_path):
    _, folder = whole
    config = tiny_images("vit_mae", **RUN | {"online__probe": False, "checkpoint__best_metric": "eval/loss"})
    train(config.to_dict(), tmp_path / "run", part="pretext", tokenizer=None, title="test")
    watched_run, plain = (read_variables(of, 12) for of in (folder, tmp_path / "run"))
    same(watched_run["params"], plain["params"])
    assert plain["state"] == {}
    taken, notes = load_encoder(jax.tree.map(jnp.asarray, plain["params"]), open_start(folder))
    same(taken["encoder"], plain["params"]["encoder"])
    assert notes == []


def test_a_run_older_than_the_option_goes_on_without_it(tmp_path):
    written = tiny_images("vit_mae").to_dict()
    written["optimizer"]["schedule_steps"] = written["steps"]
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps({name: of for name, of in written.items() if name != "online"}))
    assert resolve(tmp_path, written)["online"] == written["online"]
    younger = {"drop_path", "layer_scale"}  # fields of the model that are 0
    old = {**written, "model": {name: of for name, of in written["model"].items() if name not in younger}}
    del old["optimizer"]["layer_decay"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    written = tiny_images("vit_mae").to_dict()
    assert resolve(tmp_path, written)["model"] == json.loads(json.dumps(written["model"]))
    with pytest.raises(UserError, match=r"config.model.drop_path: None there, 0.1 now"):
        resolve(tmp_path, {**written, "model": {**written["model"], "drop_path": 0.1}})
    with pytest.raises(UserError, match=r"config.online.probe: False there, True now"):
        resolve(tmp_path, {**written, "online": {**written["online"], "probe": True}})


def test_rows_without_labels_are_refused_in_one_line(tiny_config, tmp_path):
    from PIL import Image

    for number in range(40):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    config = tiny_images(
        "rotation",
        data__source=f"images:{tmp_path}",
        **{"online__probe": True, "data__train_split": "train[:50%]", "data__eval_split": "train[50%:]"},
    )
    with pytest.raises(UserError, match=r"config.online.probe needs a label of each row, and those of 'rotation' on"):
        check_run(config.to_dict(), "pretext")
    packed = tiny_config("bert_mlm", {"online.probe": True})
    with pytest.raises(UserError, match=r"config.online.probe needs a label of each row, and those of 'mlm' on"):
        check_run(packed.to_dict(), "pretext")
    task = tiny_images("finetune/image_classification", online__probe=True, init="scratch")
    with pytest.raises(UserError, match=r"config.online.probe watches a pretext task"):
        check_run(task.to_dict(), "task")
