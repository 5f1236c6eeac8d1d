"""ViT (arXiv 2010.11929) in transformers: patches through a convolution, pre-LN blocks.

Their classes look up learned positions, which may hold anything: fixed ones go out as values (`with_learned_positions`)
and come in as learned. Their classifier reads the class token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from sslx.interop.architecture import Architecture, Head, dense, norm, one
from sslx.models.vit import VitConfig, sincos_table

LAYERS, THEIRS = "transformer/layers", "vit.encoder.layer.{}"

VIT = Architecture(
    model_type="vit",
    model="vit",
    base="ViTModel",
    prefix="vit",
    encoder=(
        *one("class_token", "vit.embeddings.cls_token", "batched"),
        *one("position", "vit.embeddings.position_embeddings", "batched"),
        *one("patches/kernel", "vit.embeddings.patch_embeddings.projection.weight", "patches"),
        *one("patches/bias", "vit.embeddings.patch_embeddings.projection.bias"),
        *norm(f"{LAYERS}/attention_norm", f"{THEIRS}.layernorm_before"),
        *dense(f"{LAYERS}/attention/query", f"{THEIRS}.attention.attention.query"),
        *dense(f"{LAYERS}/attention/key", f"{THEIRS}.attention.attention.key"),
        *dense(f"{LAYERS}/attention/value", f"{THEIRS}.attention.attention.value"),
        *dense(f"{LAYERS}/attention/out", f"{THEIRS}.attention.output.dense"),
        *norm(f"{LAYERS}/mlp_norm", f"{THEIRS}.layernorm_after"),
        *dense(f"{LAYERS}/mlp/up", f"{THEIRS}.intermediate.dense"),
        *dense(f"{LAYERS}/mlp/down", f"{THEIRS}.output.dense"),
        *norm("transformer/final_norm", "vit.layernorm"),
    ),
    heads=(Head("ViTForImageClassification", {"head": dense("", "classifier")}),),
    example="configs/vit_mae.py:base",
    fields={
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "intermediate_size": "mlp_width",
        "image_size": "image_size",
        "patch_size": "patch_size",
        "num_channels": "channels",
        "hidden_act": "activation",
        "layer_norm_eps": "norm_eps",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    },
    fixed_theirs={"qkv_bias": True},
    fixed_ours=dict(
        norm_position="pre",
        norm="layernorm",
        glu=False,
        bias=True,
        qk_norm=False,
        positions="learned",
        class_token=True,
        pool="class",
        registers=0,
        layer_scale=0.0,
    ),
)


def with_learned_positions(
    model: VitConfig, encoder: Mapping[str, np.ndarray]
) -> tuple[VitConfig, Mapping[str, np.ndarray]]:
    """A model of fixed sines and cosines, and its encoder's arrays by name, as one that has learned these numbers."""
    if model.positions != "sincos":
        return model, encoder
    front = np.zeros((int(model.class_token), model.width), np.float32)  # which stands nowhere
    table = np.concatenate([front, sincos_table(model.grid, model.width)])
    return dataclasses.replace(model, positions="learned"), {**encoder, "position": table}


def without_pooling(model: VitConfig) -> VitConfig:
    """A model for its hidden states, which are the same whether an image's features are one of them or a mean."""
    return dataclasses.replace(model, pool="class") if model.pool == "mean" and model.class_token else model
