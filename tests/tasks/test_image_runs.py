"""Every pretext task on images from its config to a classifier that starts from it, on handwritten digits."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from etils.epath import Path
from tiny_images import CONFIGS, tiny_images

from sslx import finetune, main
from sslx.config import build
from sslx.entry import load_config
from sslx.errors import UserError
from sslx.evaluate import _features, _supervised, evaluate
from sslx.inference.loading import load_run
from sslx.models.resnet import ResnetConfig
from sslx.probing.images import ImageProbe, ImageProbeConfig
from sslx.train.checkpoint import read_variables
from sslx.train.sharding import unbox

PIECES = dict(data__image_size=12, model__image_size=12, model__patch_size=4)
RUNS = {
    "vit_mae": dict(steps=60, pretext__decoder_layers=1, pretext__decoder_width=32, eval__examples=2),
    "vit_simmim": dict(steps=60, pretext__mask_size=4, eval__examples=2),
    "vit_igpt": dict(steps=40, optimizer__weight_decay=0.5, model__colours=4, model__max_length=64, eval__examples=2),
    "rotation": dict(steps=60),
    "relative_patch": dict(steps=60, pretext__head_width=64, **PIECES),
    "jigsaw": dict(steps=60, pretext__permutations=2, pretext__head_width=64, **PIECES),
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Trains once: the session and the folder of a config's run."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp(name) / "run"
        return main.main(tiny_images(name, **RUNS[name]), folder), folder

    return run


def classifier(init, folder, how, **changes):
    config = tiny_images("finetune/image_classification", how, **changes)
    with config.unlocked():
        config.init = str(init)
    return finetune.main(config, folder)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_and_a_probe_of_it_leaves_its_encoder_bit_equal(name, run_of, tmp_path):
    session, folder = run_of(name)
    assert session.trained.compilations == 1  # whatever is hidden, cut or turned
    loss, chance = session.trained.metrics["eval/loss"], session.objective.chance(session.data.statistics)
    assert loss < chance
    if RUNS[name].get("eval__examples"):
        assert list((folder / "pictures").glob("*.png"))
    size = {key: value for key, value in RUNS[name].items() if key == "data__image_size"}
    # After 30 steps a twentieth of the running averages that features are normalised by is still what they began with.
    rates = dict(optimizer__learning_rate=0.01, optimizer__weight_decay=0.1)
    probed = classifier(folder, tmp_path / "probe", "linear", steps=100, **rates, **size)
    before, after = (read_variables(of)["params"]["encoder"] for of in (folder, tmp_path / "probe"))
    same(after, before)
    assert probed.trained.metrics["eval/accuracy"] > 0.2  # a guess reaches 0.1
    report = json.loads((tmp_path / "probe" / "report.json").read_text())
    assert report["init"] == str(folder)
    if name == "vit_igpt":  # which has been trained with weight decay
        np.testing.assert_array_equal(before["codebook"], np.float32(session.objective.codebook))


def test_fine_tuning_moves_the_encoder_and_its_average_is_kept(run_of, tmp_path):
    folder = run_of("vit_mae")[1]
    # For the first 40 steps the loss stays that of a guess.
    session = classifier(folder, tmp_path / "full", "full", steps=200, task__mixup=0.2, task__ema=0.9)
    before, after = (read_variables(of) for of in (folder, tmp_path / "full"))
    encoder = after["params"]["encoder"]
    assert np.abs(encoder["patches"]["kernel"] - before["params"]["encoder"]["patches"]["kernel"]).max() > 0
    average = after["state"]["ema"]["params"]["encoder"]
    assert np.abs(average["patches"]["kernel"] - encoder["patches"]["kernel"]).max() > 0
    assert session.trained.metrics["eval/accuracy"] > 0.3


def test_running_averages_travel_from_pretraining_through_fine_tuning(tmp_path):
    resnet = ResnetConfig(depth=10, width=4, stem="cifar", image_size=8, channels=1)
    config = tiny_images("rotation")
    with config.unlocked():
        config.model = {name: getattr(resnet, name) for name in resnet.__dataclass_fields__}
    main.main(config, tmp_path / "run")
    before = read_variables(tmp_path / "run")
    assert np.abs(before["state"]["batch_stats"]["encoder"]["stem_norm"]["mean"]).max() > 0
    classifier(tmp_path / "run", tmp_path / "probe", "linear")
    probe = read_variables(tmp_path / "probe")
    same(probe["state"]["batch_stats"]["encoder"], before["state"]["batch_stats"]["encoder"])
    same(probe["params"]["encoder"], before["params"]["encoder"])
    settings = dict(task__drop_path=0.0, optimizer__layer_decay=1.0)
    classifier(tmp_path / "run", tmp_path / "full", "full", steps=3, **settings)
    full = read_variables(tmp_path / "full")["state"]
    mean = full["batch_stats"]["encoder"]["stem_norm"]["mean"]
    begun = before["state"]["batch_stats"]["encoder"]["stem_norm"]["mean"]
    # After three updates most of what pretraining has measured is still in it, and the rest is new.
    assert 0 < np.abs(mean - begun).max() < 0.5 * np.abs(begun).max()
    assert set(full["ema"]) == {"params", "batch_stats"}
    with pytest.raises(UserError, match="a resnet has none; expected 0"):
        classifier(tmp_path / "run", tmp_path / "not", "full", optimizer__layer_decay=1.0)
    with pytest.raises(UserError, match=r"layer_decay 0\.75 needs one stack of layers; the model has 0"):
        classifier(tmp_path / "run", tmp_path / "not", "full", task__drop_path=0.0)
    with pytest.raises(UserError, match="micro_batches is 2; ImageClassification compares all rows"):
        classifier(tmp_path / "run", tmp_path / "not", "full", micro_batches=2, **settings)


def evaluated(session, folder, how, **changes):
    """The results of an evaluation by few and short probes, by features and probe."""
    given = load_config(CONFIGS / "evaluate" / "image_probe.py", "data=digits")
    small = tiny_images("finetune/image_classification", "full", task__drop_path=0.0, optimizer__layer_decay=1.0)
    given.supervised = {name: small[name] for name in small if name not in ("data", "init", "steps")} if how else {}
    with given.unlocked():
        given.update_from_flattened_dict(
            {"projection": "pca", "random_encoders": 2, "linear.steps": 30, "few_shot.labels": (2,), **changes}
        )
    values = evaluate(build(ImageProbeConfig, given.to_dict()), Path(folder), load_run(folder))
    assert values["step"] == session.trained.state.step
    return {(found["features"], found["probe"]): found for found in values["results"]}


def test_an_evaluation_has_raw_pixels_random_encoders_and_one_trained_on_labels_for_as_many_steps(run_of):
    session, folder = run_of("vit_igpt")
    found = evaluated(session, folder, "supervised")
    probes, names = ("linear", "knn", "2 a class"), ("pretrained", "random 0", "random 1", "raw", "supervised")
    expected = [("supervised", "its head"), *((name, probe) for name in names for probe in probes)]
    assert list(found) == [*expected, ("commonest label", "none")]
    for name, probe in expected:
        scores = found[name, probe].get("accuracies") or [found[name, probe]["accuracy"]]
        if probe != "its head":  # which has not begun to learn after forty steps
            assert min(scores) > 0.15, (name, probe)  # a guess reaches 0.1
    supervised = folder / "evaluate" / "image_probe" / "supervised"
    reported = json.loads((supervised / "report.json").read_text())["test/accuracy"]
    assert found["supervised", "its head"]["accuracy"] == pytest.approx(reported)
    written = json.loads((supervised / "config.json").read_text())
    assert (written["steps"], written["optimizer"]["warmup_steps"]) == (40, 2)
    # The colours of its tokens are the run's, and not those of a fresh model.
    given = session.objective.codebook
    np.testing.assert_array_equal(read_variables(supervised)["params"]["encoder"]["codebook"], np.float32(given))
    objective = load_run(folder).objective
    fresh = unbox(objective.init(jax.random.key(0), {"image": np.zeros((1, 8, 8, 1), np.uint8), "row": np.arange(1)}))
    codebook = fresh["params"]["encoder"]["codebook"]
    assert np.abs(codebook - np.float32(given)).max() > 1e-3  # or there would be nothing to take over
    rows = session.data.eval
    with_run = _features(load_run(folder), ImageProbeConfig(), {"eval": rows}, fresh)["eval"].features
    own = fresh["params"]["encoder"] | {"codebook": np.float32(given)}
    images = rows.fetch(np.arange(len(rows)))["image"]
    np.testing.assert_allclose(with_run, objective.encode({"params": own}, {"image": images}), atol=1e-4)


def test_the_baseline_of_a_short_run_warms_up_in_time(run_of, monkeypatch):
    folder = run_of("rotation")[1]
    seen = {}

    def noting(config, workdir):
        seen.update(config.to_dict())
        raise UserError("seen")

    monkeypatch.setattr(finetune, "main", noting)
    run = dataclasses.replace(load_run(folder), step=50)
    given = load_config(CONFIGS / "evaluate" / "image_probe.py", "data=digits")
    config = build(ImageProbeConfig, given.to_dict())
    with pytest.raises(UserError, match="seen"):
        _supervised(config, ImageProbe().data(config, run), folder, run, folder / "not")
    assert seen["batch_size"] == run.written["batch_size"]
    assert (seen["steps"], seen["optimizer"]["warmup_steps"]) == (50, 5)
    # From random parameters, nothing is held back; and any model may be the run's.
    assert (seen["optimizer"]["layer_decay"], seen["task"]["drop_path"]) == (1.0, 0.0)
