"""Every config in ``configs/`` builds at its full size, without data and without arrays."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from sslx.entry import load_config
from sslx.errors import UserError
from sslx.models.bert import SIZES
from sslx.models.gpt import SIZES as GPT_SIZES
from sslx.session import run_config
from sslx.train.initialise import objective_class, part_of
from sslx.train.optimizer import make_optimizer, make_schedule
from sslx.train.sharding import PARAMETER_AXES, is_box

CONFIGS = Path(__file__).parent.parent / "configs"
# Evaluations train nothing; test_evaluate.py builds theirs.
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.py") if path.parent != CONFIGS / "evaluate")
MILLIONS = {"tiny": 4.4, "mini": 11.2, "small": 29.0, "base": 109.5, "large": 335.2}  # without pooler and sentence head


def shapes(file, argument=""):
    """Boxed parameters of a config at full size; its optimizer is built over them too."""
    written = load_config(CONFIGS / file, argument).to_dict()
    config = run_config(written, part_of(written))
    objective, row = objective_class(written).abstract(written)
    batch = {name: np.zeros((1, *leaf.shape), leaf.dtype) for name, leaf in row.items()} | {"row": np.zeros(1, int)}
    boxed = jax.eval_shape(lambda: objective.init(jax.random.key(0), batch))["params"]
    make_optimizer(config.optimizer, make_schedule(config.optimizer, config.steps), boxed)
    assert objective.flops({name: array.shape for name, array in batch.items()}) > 0
    return boxed


@pytest.mark.parametrize("file", FILES)
def test_every_config_builds_and_names_the_axes_of_its_parameters(file):
    for leaf in jax.tree.leaves(shapes(file), is_leaf=is_box):
        assert is_box(leaf)
        assert set(leaf.names) - {None} <= set(PARAMETER_AXES)


@pytest.mark.parametrize("size", SIZES)
def test_bert_of_every_size_has_its_published_parameters(size):
    leaves = jax.tree.leaves(shapes("bert_mlm.py", size))
    assert sum(leaf.size for leaf in leaves) / 1e6 == pytest.approx(MILLIONS[size], rel=0.01)


@pytest.mark.parametrize(("size", "discriminator"), {"small": 13.6, "base": 109.5, "large": 335.2}.items())
def test_electra_of_every_size_has_its_published_parameters(size, discriminator):
    boxed = shapes("electra.py", size)
    kept = [boxed["encoder"], boxed["discriminator_head"]]
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) / 1e6 == pytest.approx(discriminator, rel=0.01)


def test_data2vec_of_its_published_size_builds():
    shapes("span_context.py", "base")


def test_pairs_may_have_numbers():
    shapes("finetune/text_pairs.py", "data=csv:pairs.csv,labels=number")


@pytest.mark.parametrize("size", GPT_SIZES)
def test_gpt_of_every_size_builds(size):
    shapes("gpt_clm.py", size)


def test_an_unknown_size_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="'bas'; did you mean 'base'"):
        load_config(CONFIGS / "bert_mlm.py", "bas")
    with pytest.raises(UserError, match=r"unknown config argument 'dta'.* did you mean 'data'"):
        load_config(CONFIGS / "bert_mlm.py", "base,dta=text:*.txt")
