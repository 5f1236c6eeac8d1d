"""The embedded glyphs: unseen shapes are unseen, labels are Unicode's, and they are drawn the same every time."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from fontTools.unicodedata import script, script_name
from PIL import Image, ImageDraw, ImageFont

from sslx.data.glyphs import CATEGORIES, FACES, INK, LEAST_OF_SCRIPT, OTHER, _Face, glyphs
from sslx.data.image_sources import open_images
from sslx.errors import UserError

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture(scope="module")
def made():
    return glyphs(os.environ["SSLX_CACHE"])


def test_every_named_character_of_every_face_is_there_once(made):
    assert made.images.shape == (len(made.characters), 32, 32, 1)
    assert made.images.dtype == np.uint8
    assert len(made.names["face"]) == 13
    for number, face in enumerate(made.names["face"]):
        with TTFont(FONTS / FACES[face]) as font:
            named = {c for c in font.getBestCmap() if unicodedata.name(chr(c), "")}
        shaped = {
            c for c in named if unicodedata.category(chr(c))[0] not in "ZC" and unicodedata.category(chr(c)) != "Mn"
        }
        drawn = made.characters[made.labels["face"] == number]
        assert len(set(drawn.tolist())) == len(drawn)
        assert set(drawn.tolist()) <= shaped
        assert len(shaped - set(drawn.tolist())) < 5  # named, and without ink
    assert made.images.reshape(len(made.images), -1).any(axis=1).all()


def test_no_character_and_no_picture_is_in_two_splits(made):
    parts = {split: slice(*bounds) for split, bounds in made.bounds.items()}
    assert list(parts) == ["train", "validation", "test"]
    sizes = [part.stop - part.start for part in parts.values()]
    assert sum(sizes) == len(made.images)
    assert np.array(sizes) / sum(sizes) == pytest.approx([0.8, 0.08, 0.12], abs=0.01)
    pictures = np.array([hash(image.tobytes()) for image in made.images])
    for of in (made.characters, pictures):
        train, validation, test = (set(of[part].tolist()) for part in parts.values())
        assert not train & validation
        assert not train & test
        assert not validation & test
    # Latin A and Greek Alpha are one shape.
    place = {chr(c): split for split, part in parts.items() for c in made.characters[part].tolist()}
    assert place["A"] == place["\N{GREEK CAPITAL LETTER ALPHA}"] == place["\N{CYRILLIC CAPITAL LETTER A}"]


def test_every_script_is_in_every_split(made):
    for bounds in made.bounds.values():
        scripts = made.labels["script"][slice(*bounds)]
        assert set(scripts.tolist()) == set(range(len(made.names["script"])))


def test_labels_are_unicodes(made):
    known = np.unique(made.characters)
    scripts = [script_name(script(chr(c))) for c in known.tolist()]
    rare = {name for name in set(scripts) if scripts.count(name) < LEAST_OF_SCRIPT}
    expected = {c: OTHER if name in rare else name for c, name in zip(known.tolist(), scripts, strict=True)}
    assert set(made.names["script"]) == set(expected.values())
    found = np.array(made.names["script"])[made.labels["script"]]
    assert found.tolist() == [expected[c] for c in made.characters.tolist()]
    found = np.array(made.names["category"])[made.labels["category"]]
    assert found.tolist() == [CATEGORIES[unicodedata.category(chr(c))] for c in made.characters.tolist()]


def test_captions_and_pictures_are_of_the_character_and_the_face(made):
    row = int(np.nonzero(made.characters == ord("ß"))[0][0])
    face = made.names["face"][made.labels["face"][row]]
    assert made.caption(row) == f"LATIN SMALL LETTER SHARP S, {face}"
    # The same ink as Pillow draws elsewhere, in whatever size it was.
    ink = made.images[row, ..., 0]
    drawn = []
    for size in range(8, 29):
        canvas = Image.new("L", (80, 80))
        ImageDraw.Draw(canvas).text((20, 60), "ß", 255, ImageFont.truetype(str(FONTS / FACES[face]), size), anchor="ls")
        drawn.append(np.asarray(canvas))
    assert any(np.array_equal(cut(ink), cut(other)) for other in drawn)


def cut(ink):
    """What is inside the ink's bounding box."""
    rows, columns = np.nonzero(ink.any(axis=1))[0], np.nonzero(ink.any(axis=0))[0]
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def test_a_character_is_as_large_as_fits_and_in_the_middle(made):
    largest = 0
    for row in range(0, len(made.images), 997):
        ink = made.images[row, ..., 0] > 0
        extents = []
        for axis in (0, 1):
            places = np.nonzero(ink.any(axis=1 - axis))[0]
            extents.append(int(places[-1] - places[0] + 1))
            assert abs(places[0] + places[-1] - 31) <= 1
        largest = max(largest, *extents)
        assert max(extents) <= INK
    assert largest == INK


def test_drawing_is_the_same_every_time(made):
    draw = {number: _Face(FONTS / FACES[face]) for number, face in enumerate(made.names["face"])}
    for row in range(5, len(made.images), 1009):
        picture = draw[int(made.labels["face"][row])](chr(made.characters[row]))
        np.testing.assert_array_equal(picture, made.images[row, ..., 0])


def test_as_a_source_its_labels_are_chosen_by_name(made):
    options = dict(image_field="image", cache_dir=os.environ["SSLX_CACHE"])
    collection = open_images("glyphs", label_field="label", **options)
    assert collection.label_names == made.names["script"]
    source = collection.slice("test[:100]")
    first = made.bounds["test"][0]
    assert [row["label"] for row in source.__getitems__(range(100))] == made.labels["script"][
        first : first + 100
    ].tolist()
    np.testing.assert_array_equal(source[7]["image"], made.images[first + 7])
    assert open_images("glyphs", label_field="face", **options).label_names == made.names["face"]
    with pytest.raises(UserError, match="label_field of glyphs 'scripts'; did you mean 'script'"):
        open_images("glyphs", label_field="scripts", **options)
