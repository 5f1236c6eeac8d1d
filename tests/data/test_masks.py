"""Folders of pictures with masks: their classes, sizes and errors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from sslx.data.masks import IGNORED, MaskConfig, abstract_mask_row, prepare_masks
from sslx.errors import UserError


@pytest.fixture
def folders(tmp_path):
    """Four pictures of 8 x 4 pixels; of each, the right half is class 1 or 2, and one corner is not asked for."""
    for name in ("pictures/train", "pictures/val", "masks/train", "masks/val"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "masks" / "classes.txt").write_text("ground\ntree\nhouse\n")
    for number in range(4):
        place = f"{'train' if number < 3 else 'val'}/{number}"
        Image.new("RGB", (8, 4), (10 * number, 0, 0)).save(tmp_path / "pictures" / f"{place}.png")
        mask = np.zeros((4, 8), np.uint8)
        mask[:, 4:] = 1 + number % 2
        mask[0, 0] = IGNORED
        picture = Image.fromarray(mask)
        if number == 0:  # a palette's numbers are the classes, whatever the colours
            picture = picture.convert("P")
            picture.putdata(mask.ravel().tolist())
            picture.putpalette([255, 0, 0, 0, 255, 0] + [7] * 762)
        picture.save(tmp_path / "masks" / f"{place}.png")
    return MaskConfig(
        f"masks:{tmp_path}/pictures",
        masks=str(tmp_path / "masks"),
        image_size=8,
        cache_dir=str(tmp_path / "cache"),
    )


def test_masks_lie_on_their_pictures(folders):
    data = prepare_masks(folders)
    assert data.label_names == ("ground", "tree", "house")
    assert (len(data.train), len(data.eval), data.test) == (3, 1, None)
    rows = data.train.fetch(np.arange(3))
    for name, leaf in abstract_mask_row(folders).items():
        assert rows[name].shape == (3, *leaf.shape)
        assert rows[name].dtype == leaf.dtype
    for row in range(3):
        mask = rows["mask"][row]
        assert (mask[4:] == IGNORED).all()  # below the picture
        assert mask[0, 0] == IGNORED
        assert (mask[1:4, :4] == 0).all()
        assert (mask[:4, 4:] == 1 + row % 2).all()
    # Of the held-out picture's 31 pixels, 16 are of one class and 15 of another.
    p = np.array([15, 16]) / 31
    assert data.statistics["eval_pixel_entropy"] == pytest.approx(-np.sum(p * np.log(p)))


def test_a_mask_keeps_whole_classes_when_it_is_made_smaller(folders):
    data = prepare_masks(dataclasses.replace(folders, image_size=4))
    mask = data.train.fetch(np.array([1]))["mask"][0]
    assert mask.shape == (4, 4)
    assert set(np.unique(mask[:2])) <= {0, 2, IGNORED}
    assert (mask[:2, 2:] == 2).all()


def test_masks_that_are_wrong_are_refused_in_one_line(folders, tmp_path):
    def refused(message):
        with pytest.raises(UserError, match=message):
            prepare_masks(dataclasses.replace(folders, cache_dir=str(tmp_path / "other_cache")))

    mask = tmp_path / "masks" / "train" / "1.png"
    kept = mask.read_bytes()
    Image.fromarray(np.full((4, 8), 9, np.uint8)).save(mask)
    refused(r"1\.png has class 9; classes\.txt names 0 to 2")
    Image.new("L", (8, 8)).save(mask)
    refused(r"has 8 x 8 pixels and the picture 8 x 4")
    Image.new("RGB", (8, 4)).save(mask)
    refused(r"1\.png is a picture in RGB; expected a palette or 8 bits of grey")
    mask.write_bytes(b"nothing")
    refused(r"1\.png is no mask")
    mask.unlink()
    refused(r"1 of 4 pictures of .* have no mask, such as .*1\.png")
    mask.write_bytes(kept)
    (tmp_path / "masks" / "classes.txt").write_text("ground\ntree\ntree\n")
    refused(r"classes\.txt has the name 'tree' twice; expected one for each class")
    (tmp_path / "masks" / "classes.txt").unlink()
    refused(r"there is no .*classes\.txt; expected the names of the classes")
    for changes, message in (
        ({"masks": ""}, "config.data.masks is ''; expected the folder of the masks"),
        ({"source": "mask:x"}, "unknown source of masks 'mask:x'; did you mean 'masks:FOLDER'"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_masks(dataclasses.replace(folders, **changes))
