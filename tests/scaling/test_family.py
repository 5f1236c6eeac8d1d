"""The family of sizes: valid and rising in its one parameter, and counted exactly as a run would be."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest

from sslx.config import build
from sslx.errors import UserError
from sslx.models.bert import MODERN, BertConfig
from sslx.pretext.mlm import MaskedLanguageModel
from sslx.scaling.family import Family, measure, parse_sizes
from sslx.session import run_config
from sslx.train.sharding import unbox

BASE = dataclasses.asdict(BertConfig(layers=2, width=192, heads=3, mlp_width=384, **MODERN))


@pytest.mark.parametrize("family", [Family(), Family(aspect=64.0, head_width=64), Family(aspect=12.5, head_width=16)])
def test_every_member_is_a_model_that_can_be_built_and_is_larger_than_the_one_before(family):
    widths = family.ladder(family.head_width, 64 * family.head_width)
    models = [build(BertConfig, BASE | family.model(width, BASE)) for width in widths]
    assert len(models) >= 10
    for model in models:
        assert model.width // model.heads == family.head_width
        assert model.width % model.heads == 0
        assert abs(model.layers - max(1, model.width / family.aspect)) <= 0.5
    for before, after in itertools.pairwise(models):
        assert (after.width, after.heads) > (before.width, before.heads)
        assert after.layers >= before.layers
        assert after.mlp_width > before.mlp_width


@pytest.mark.parametrize(("width", "mlp_width"), [(192, 384), (768, 3072), (96, 256)])
def test_the_mlp_keeps_the_base_configs_multiple(width, mlp_width):
    base = {"layers": 1, "width": width, "heads": 1, "mlp_width": mlp_width}
    for member in (64, 128, 320):
        assert Family().model(member, base)["mlp_width"] == pytest.approx(member * mlp_width / width, abs=4)


def test_the_learning_rate_is_the_configs_at_its_width_and_follows_the_rule_elsewhere():
    for rule, four_times_wider in (("constant", 1.0), ("sqrt", 0.5), ("inverse", 0.25)):
        family = Family(rate_rule=rule)
        assert family.learning_rate(192, 192, 3e-3) == 3e-3
        assert family.learning_rate(768, 192, 3e-3) == pytest.approx(3e-3 * four_times_wider, rel=1e-3)


def test_a_width_that_heads_do_not_divide_is_refused_with_its_neighbours():
    with pytest.raises(UserError, match=r"size 100 is no multiple of --head_width=32; the nearest sizes are 96, 128"):
        Family().model(100, BASE)


def test_a_model_without_layers_is_refused():
    with pytest.raises(UserError, match=r"config.model has no layers, which sizes are made of; .*mlp_width"):
        Family().model(64, {key: value for key, value in BASE.items() if key != "layers"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no sizes given"),
        ("64,base", "unknown size 'base' in --sizes=64,base"),
        ("64,-1", "unknown size '-1'"),
        ("64,96,64", "has a size twice"),
    ],
)
def test_sizes_that_are_no_widths_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_sizes(text)


def test_parameters_and_flops_are_those_of_the_run(tiny_config):
    written = tiny_config("bert_mlm", {"model.positions": "learned"}).to_dict()
    written |= dataclasses.asdict(run_config(written, "pretext"))
    family = Family(head_width=16)
    (size,), statistics = measure(written, family, [48])
    config = written | {"model": written["model"] | family.model(48, written["model"])}
    objective, data = MaskedLanguageModel.prepare(config)
    row = data.train.fetch(np.zeros(1, np.int64)) | {"row": np.zeros(1, np.int32)}
    params = unbox(jax.eval_shape(lambda: objective.init(jax.random.key(0), row)["params"]))
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    tables = params["encoder"]["embeddings"]
    assert size.total == count(params)
    assert size.non_embedding == size.total - count([tables["word"], tables["position"], params["mlm_head"]["bias"]])
    assert size.total > size.non_embedding > 0
    shapes = {"tokens": (written["batch_size"], written["data"]["seq_len"])}
    step_tokens = written["batch_size"] * statistics["tokens_per_row"]
    assert size.flops_per_token * step_tokens == pytest.approx(objective.flops(shapes))
    assert statistics["fingerprint"] == data.statistics["fingerprint"]
