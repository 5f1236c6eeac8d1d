"""The preview shows the rows and masks of step 0 as the training step draws them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from tiny_images import tiny_images

from sslx import preview
from sslx.data.batches import training_rows
from sslx.entry import load_config
from sslx.objective import Out, Term
from sslx.picture_sheet import GAP, TITLE, sheet
from sslx.pretext.mae import Mae
from sslx.pretext.mlm import MaskedLanguageModel
from sslx.session import run_config
from sslx.tasks.image_classification import ImageClassification
from sslx.train import loop
from sslx.train.step import TrainState, make_train_step, train_keys


@pytest.mark.parametrize("sentence", [None, "nsp"])
def test_rows_shown_are_those_that_training_sees(tiny_config, tmp_path, monkeypatch, capsys, sentence):
    config = tiny_config("bert_mlm", {"seed": 3, "pretext.sentence": sentence, "pretext.mask_ratio": 0.3})
    shown = preview.main(config, tmp_path)
    printed = capsys.readouterr().out

    written = config.to_dict()
    run = run_config(written, "pretext")
    objective, data = MaskedLanguageModel.prepare(written)
    batch = jax.device_get(loop.Trainer(run, objective, data).batches.at(0))
    seen = []

    def catch(self, params, state, viewed, key, number, *, train):
        jax.debug.callback(seen.append, viewed)
        return Out({name: Term(params) for name in viewed["weights"]})

    # The step that training compiles, with a loss that only tells what it was given.
    monkeypatch.setattr(MaskedLanguageModel, "loss", catch)
    optimizer = optax.sgd(0.0)
    train_step = make_train_step(objective, optimizer, optax.constant_schedule(0.0), seed=run.seed)
    params = jnp.zeros(())
    jax.jit(train_step)(TrainState(jnp.zeros((), jnp.int32), params, {}, optimizer.init(params)), batch)
    jax.effects_barrier()

    expected = objective.preview(batch, jax.device_get(seen[0]))[: preview.ROWS]
    assert shown == expected
    assert "<-" in shown[0]["text"]
    assert ("sentence label" in shown[0]) == (sentence is not None)
    for fields in shown:
        assert fields["tokens"] in printed
    assert "unigram_entropy" in printed
    assert list(tmp_path.iterdir()) == []


def test_rows_of_a_task_are_shown_too(tiny_config, tmp_path):
    shown = preview.main(tiny_config("finetune/text_classification", {"init": "scratch"}), tmp_path)
    assert len(shown) == preview.ROWS
    assert all(row["text"].startswith("[CLS] ") and row["label"] for row in shown)


@pytest.mark.parametrize("batch_size", [3, 16])
def test_views_that_are_mixed_with_other_rows_are_those_of_training(tmp_path, monkeypatch, batch_size):
    monkeypatch.chdir(tmp_path)
    given = {"init": "scratch", "task__mixup": 1.0, "batch_size": batch_size, "seed": 2}
    config = tiny_images("finetune/image_classification", **given)
    shown = preview.main(config, tmp_path / "run")
    assert len(shown) == min(batch_size, preview.ROWS)
    picture = np.asarray(Image.open("preview_views.png"))

    objective, data = ImageClassification.prepare(config.to_dict())
    batch = training_rows(data.train, data.train.order(2), np.arange(batch_size), 2)
    key = train_keys(2, 0)[0]
    views = jax.jit(lambda batch: objective.views(batch, key, 0, train=True))(batch)["image"]
    for row in range(len(shown)):
        tile = picture[TITLE + row * 100 :, GAP + 100 :][:96:12, :96:12]
        np.testing.assert_allclose(tile[..., 0], np.asarray(views[row, ..., 0]) * 255, atol=0.6)


def test_a_sheet_of_rows_views_and_masks_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = load_config(Path(__file__).resolve().parent.parent / "configs" / "vit_mae.py")
    with config.unlocked():
        size = {f"{part}.{name}": value for part in ("data", "model") for name, value in SMALL.items()}
        model = {"model.patch_size": 4, "model.layers": 1, "model.width": 16, "model.heads": 2, "model.mlp_width": 32}
        config.update_from_flattened_dict({"data.source": "digits", "batch_size": 16, "seed": 5} | size | model)
    shown = preview.main(config, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["preview_views.png"]
    assert "written: preview_views.png" in capsys.readouterr().out
    picture = np.asarray(Image.open("preview_views.png"))

    data = Mae.prepare(config.to_dict())[1]
    batch = training_rows(data.train, data.train.order(5), np.arange(preview.ROWS), 5)
    assert [row["picture"].startswith("16x16x1, mean ") for row in shown] == [True] * preview.ROWS
    tile = lambda row, column: picture[TITLE + row * 100 :, GAP + column * 100 :][:96, :96]  # noqa: E731
    for row in range(preview.ROWS):
        enlarged = np.kron(batch["image"][row, ..., 0], np.ones((6, 6), np.uint8))
        np.testing.assert_array_equal(tile(row, 0), np.repeat(enlarged[..., None], 3, axis=-1))
        view, masked = tile(row, 1).astype(int), tile(row, 2).astype(int)
        patches = (masked != view).any(axis=-1).reshape(4, 24, 4, 24).any(axis=(1, 3))
        hidden = (np.abs(masked - 127.5) < 1).all(axis=-1).reshape(4, 24, 4, 24).all(axis=(1, 3))
        assert hidden.sum() == 12  # three quarters of sixteen
        assert not (patches & ~hidden).any()


SMALL = {"image_size": 16, "channels": 1}


def test_sheets_hold_pictures_of_any_size_side_by_side():
    small = np.arange(2 * 40 * 50, dtype=np.float32).reshape(2, 40, 50, 1) / 4000
    large = np.random.default_rng(0).integers(0, 256, (3, 120, 100, 3), dtype=np.uint8)
    drawn = sheet({"small": small, "large": large}, across=2)
    assert drawn.dtype == np.uint8
    assert drawn.shape == (TITLE + 124 + GAP, GAP + 4 * 104, 3)  # two examples, of two columns each
    for example in range(2):
        left = GAP + 2 * example * 104
        expected = np.repeat(np.round(small[example] * 255), 3, axis=-1)
        np.testing.assert_array_equal(drawn[TITLE : TITLE + 40, left : left + 50], expected)
        np.testing.assert_array_equal(drawn[TITLE : TITLE + 120, left + 104 : left + 204], large[example])
    assert (drawn[:TITLE] != 255).any()  # titles
    assert (drawn[-GAP:] == 255).all()
