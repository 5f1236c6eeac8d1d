"""Which program computes attention; splash attention, interpreted, is attention: NumPy float64, and gradients."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from one_step import assert_close

from sslx.errors import UserError
from sslx.models import attention_kernels
from sslx.models.attention import attend
from sslx.models.attention_kernels import Call, chosen, refused, splash
from sslx.models.bert import BertConfig, BertEncoder
from sslx.models.gpt import GptConfig
from sslx.settings import MeshConfig
from sslx.train.sharding import make_mesh, on_mesh, unbox

LENGTH = 256
ON_TPU = Call("tpu", "bfloat16", 512, 512, 4, 64, masked=True, causal=False, dropout=False)
ON_GPU = dataclasses.replace(ON_TPU, platform="gpu")


def drawn(rows: int, queries: int = LENGTH, heads: int = 2, width: int = 16):
    """Queries, keys, values, a gradient, and the segments of packed rows, the last of which is full."""
    rng = np.random.default_rng(0)
    query, gradient = rng.normal(0, 1.5, (2, rows, queries, heads, width)).astype(np.float32)
    key, value = rng.normal(0, 1.5, (2, rows, LENGTH, heads, width)).astype(np.float32)
    segments = np.zeros((rows, LENGTH), np.int32)
    for row in range(rows):
        segments[row, :90], segments[row, 90:200], segments[row, 200:230] = 1, 2, 3
    segments[-1] = 1
    return query, key, value, gradient, segments


def reference(query, key, value, seen):
    """float64; ``seen`` bool[batch, queries, length]."""
    scores = np.einsum("bqhd,bkhd->bhqk", np.float64(query), np.float64(key)) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * seen[:, None]
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), np.float64(value))


@pytest.mark.parametrize("causal", [False, True])
def test_splash_attention_is_attention_within_segments(causal):
    query, key, value, gradient, segments = drawn(2)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), segments.shape)
    order = (places, places) if causal else None

    def plain(query, key, value):
        out = attend(query, key, value, segments, segments, order=order)
        return jnp.sum(out * gradient), out

    def kernel(query, key, value):
        out = splash(query, key, value, (segments, segments), causal=causal, interpret=True)
        return jnp.sum(out * gradient), out

    given = query, key, value
    expected, _ = jax.jit(jax.grad(plain, argnums=(0, 1, 2), has_aux=True))(*given)
    found, out = jax.jit(jax.grad(kernel, argnums=(0, 1, 2), has_aux=True))(*given)
    seen = segments[:, :, None] == segments[:, None, :]
    seen &= np.tril(np.ones_like(seen)) if causal else True
    np.testing.assert_allclose(out, reference(*given, seen), atol=5e-6)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_queries_that_fill_no_block_are_padded_and_devices_share_rows_and_heads(masked):
    query, key, value, _, segments = drawn(4, queries=20)
    asking = segments[:, 80:100]
    mesh = make_mesh(MeshConfig(data=4, tensor=2))

    def kernel(*given):
        return splash(*given[:3], given[3:] or None, causal=False, interpret=True)

    rows, ids = PartitionSpec(("data", "fsdp"), None, "tensor"), PartitionSpec(("data", "fsdp"))
    given = [query, key, value] + ([asking, segments] if masked else [])
    with on_mesh(mesh):
        placed = [jax.device_put(one, NamedSharding(mesh, rows if one.ndim == 4 else ids)) for one in given]
        out = jax.jit(kernel)(*placed)
    seen = asking[:, :, None] == segments[:, None, :] if masked else np.ones((4, 20, LENGTH), bool)
    np.testing.assert_allclose(out, reference(query, key, value, seen), atol=5e-6)


@pytest.mark.parametrize(("name", "causal"), [("bert", False), ("gpt", True)])
def test_a_model_computes_the_same_by_a_kernel(monkeypatch, name, causal):
    monkeypatch.setitem(attention_kernels.KERNELS, "splash", functools.partial(splash, interpret=True))
    monkeypatch.setitem(attention_kernels.PLATFORMS, "splash", "cpu")
    shape = dict(layers=2, width=32, heads=2, mlp_width=32, dropout=0.0, attention_dropout=0.0)
    random, lengths = np.random.default_rng(7), [(90, 60, 70), (LENGTH,)]  # the first row has padding
    segments, positions = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), np.int32)
    for row, parts in enumerate(lengths):
        ids = np.repeat(np.arange(1, len(parts) + 1), parts)
        segments[row, : len(ids)] = ids
        positions[row, : len(ids)] = np.concatenate([np.arange(part) for part in parts])
    batch = {"tokens": random.integers(0, 50, (2, LENGTH), dtype=np.int32), "segment_ids": segments}
    batch["positions"] = positions
    config = {"bert": BertConfig, "gpt": GptConfig}[name](**shape, max_length=LENGTH)
    params = unbox(config.encoder(50).init(jax.random.key(0), batch, deterministic=True))
    there = (segments > 0)[..., None]

    def states(attention):
        model = dataclasses.replace(config, attention=attention).encoder(50)

        def loss(params):
            x = model.apply(params, batch, deterministic=True)
            return jnp.sum(there * jnp.sin(x)), x

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (expected, plain), (found, by_kernel) = states("xla"), states("splash")
    np.testing.assert_allclose(np.where(there, by_kernel, 0), np.where(there, plain, 0), atol=2e-5)
    assert_close(expected, found)


def test_auto_takes_splash_attention_where_it_can_run_and_cudnn_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(attention_kernels, "_cudnn_says", lambda call: "")
    cases = {
        "xla": [
            {"platform": "cpu"},
            {"dropout": True},
            {"split": ("config.mesh.sequence",)},
            {"keys": 256, "queries": 256},  # short
            {"platform": "tpu", "keys": 577, "queries": 577},
            {"platform": "gpu"},
        ],
        "splash": [{"platform": "tpu"}, {"platform": "tpu", "dtype": "float32"}, {"platform": "tpu", "queries": 77}],
    }
    for expected, changes in cases.items():
        for change in changes:
            assert chosen("auto", dataclasses.replace(ON_TPU, **change)) == expected, change
    for change in ({}, {"queries": 577, "keys": 577, "masked": False}):
        assert chosen("cudnn", dataclasses.replace(ON_TPU, platform="gpu", **change)) == "cudnn"


@pytest.mark.parametrize(
    ("name", "call", "change", "said"),
    [
        ("cudnn", ON_TPU, {}, "runs on a GPU, and the devices are TPUs"),
        ("splash", ON_GPU, {}, "runs on a TPU, and the devices are GPUs"),
        ("splash", ON_TPU, {"dropout": True}, "drops no attention probabilities"),
        ("splash", ON_TPU, {"keys": 200}, "takes rows of a multiple of 128 tokens, and these have 200"),
        ("splash", ON_TPU, {"split": ("config.mesh.sequence",)}, "which config.mesh.sequence does not leave"),
        ("cudnn", ON_GPU, {"dtype": "float32"}, "computes in bfloat16, and config.model.dtype is float32"),
        ("cudnn", ON_GPU, {"head_width": 12}, "heads of a multiple of 8 features, at most 256, and these have 12"),
        ("cudnn", ON_GPU, {"head_width": 264}, "at most 256, and these have 264"),
        ("cudnn", ON_GPU, {"queries": 77}, "an even number of tokens, and these have 512, 77 of which ask"),
        ("cudnn", ON_GPU, {}, "does not take this shape ("),  # as cuDNN itself says, which is not here
    ],
)
def test_a_kernel_that_cannot_run_is_refused_in_one_line(name, call, change, said):
    with pytest.raises(UserError, match=f"^config.model.attention is {name}, which ") as refusal:
        chosen(name, dataclasses.replace(call, **change))
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith("expected auto or xla here")


def test_a_model_refuses_a_kernel_before_anything_is_compiled():
    with pytest.raises(UserError, match=r"config\.model\.attention is splash, which drops no attention probabilities"):
        BertConfig(attention="splash", attention_dropout=0.1)
    with pytest.raises(UserError, match=r"unknown config\.model\.attention 'splsh'; did you mean 'splash'"):
        BertConfig(attention="splsh")
    encoder = BertEncoder(BertConfig(attention="splash", attention_dropout=0.0), 120)
    batch = dict.fromkeys(("tokens", "segment_ids", "positions"), np.zeros((1, 128), np.int32))
    with pytest.raises(UserError, match="splash, which runs on a TPU, and the devices are CPUs"):
        jax.eval_shape(lambda: encoder.init(jax.random.key(0), batch, deterministic=True))


def test_what_the_mesh_divides_unevenly_is_named():
    query = jnp.zeros((6, 128, 3, 8))
    call = lambda: attention_kernels.call_of(query, query, masked=False, causal=False, dropout=False)  # noqa: E731
    assert call().split == ()
    with on_mesh(make_mesh(MeshConfig(data=2, sequence=2, tensor=2))):
        assert call().split == ("config.mesh.sequence", "config.model.heads")
        assert "config.mesh.sequence and config.model.heads does not leave" in refused(
            "splash", dataclasses.replace(call(), platform="tpu")
        )
