"""Masked autoencoding (MAE, arXiv 2111.06377): see a quarter of a picture's patches, paint the rest.

In: pictures. Views: a random crop, and which patches are hidden, an exact count. The encoder sees the visible patches
alone; a narrower decoder sees its outputs, with a mask token in each hidden place, and predicts pixels. Out: one term,
the mean square over the hidden patches, of pixels normalised patch by patch (``norm_pixels``) to mean 0 and variance 1.

The decoder is thrown away: the product is the encoder, which then sees all patches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from sslx.augment.policy import AugmentConfig
from sslx.data.prepared import PreparedPictures
from sslx.errors import UserError
from sslx.models.layers import Dense, bert_init
from sslx.models.pixels import patchify, take_patches
from sslx.models.transformer import Transformer
from sslx.models.vit import VitConfig, VitEncoder, sincos_table
from sslx.objective import Batch, Out, Term, row_keys
from sslx.pretext.image import STATISTICS_FROM, some_pictures
from sslx.pretext.patch_masks import MaskedPixels, check_ratio, hidden_count, reconstructed, split_patches

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class MaeConfig:
    """``config.pretext`` of ``name="mae"``."""

    name: str = "mae"
    mask_ratio: float = 0.75
    decoder_layers: int = 8
    decoder_width: int = 512
    decoder_heads: int = 16
    norm_pixels: bool = True  # of each patch
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)

    def __post_init__(self):
        for name in ("decoder_layers", "decoder_width", "decoder_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"config.pretext.{name} is {getattr(self, name)}; expected at least 1")
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise UserError(
                f"config.pretext.decoder_width {self.decoder_width} does not divide into config.pretext.decoder_heads "
                f"{self.decoder_heads}, or by 4"
            )


def decoder_of(model: VitConfig, pretext: MaeConfig) -> VitConfig:
    """The decoder's shape: the encoder's kind of block, with fixed positions."""
    width = pretext.decoder_width
    size = dict(layers=pretext.decoder_layers, width=width, heads=pretext.decoder_heads, mlp_width=4 * width)
    plain = dict(positions="sincos", drop_path=0.0, class_token=True, registers=0)
    return dataclasses.replace(model, **size, **plain)


class Decoder(nn.Module):
    """Mask tokens in the hidden places, a transformer over all, and pixels of the hidden patches."""

    config: VitConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        visible: Array,
        hidden: Array,
        *,
        front: int,
        deterministic: bool,
    ) -> Float[Array, "batch hidden values"]:
        """``front`` is how many of the encoder's tokens stand before the patches."""
        config = self.config
        options = dict(kernel_init=config.kernel_init, dtype=config.compute_dtype)
        x = Dense(config.width, ("embed", None), name="embed", **options)(x)
        token = self.param("mask_token", nn.with_logical_partitioning(bert_init, ("norm",)), (config.width,))
        rows = jnp.arange(x.shape[0])[:, None]
        places = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], config.patches, config.width))
        places = places.at[rows, visible].set(x[:, front:])
        places = places + jnp.asarray(sincos_table(config.grid, config.width), x.dtype)
        x = jnp.concatenate([x[:, :front], places], axis=1)
        x = nn.with_logical_constraint(x, ("act_batch", "act_length", "act_embed"))
        order = jnp.zeros(x.shape[:2], jnp.int32)
        # Only the hidden places are asked for, so the last layer computes no others.
        x = Transformer(config, name="transformer")(x, None, order, front + hidden, deterministic=deterministic)
        return Dense(config.patch_values, ("embed", None), name="pixels", **options)(x).astype(jnp.float32)


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder."""

    config: VitConfig
    pretext: MaeConfig

    def setup(self):
        self.encoder = VitEncoder(self.config)
        self.decoder = Decoder(decoder_of(self.config, self.pretext))

    def __call__(self, batch: Batch, *, deterministic: bool) -> Float[Array, "batch hidden values"]:
        x = self.encoder(batch, visible=batch["visible"], deterministic=deterministic)
        return self.decoder(x, batch["visible"], batch["hidden"], front=self.config.front, deterministic=deterministic)


def patch_spread(
    patches: Float[Array, "batch some values"],
) -> tuple[Float[Array, "batch some 1"], Float[Array, "batch some 1"]]:
    """Mean and deviation of each patch; the variance is over one number less, and never 0."""
    variance = jnp.var(patches, axis=-1, keepdims=True, ddof=1)
    return jnp.mean(patches, axis=-1, keepdims=True), jnp.sqrt(variance + EPS)


def patch_targets(images: Array, model: VitConfig, *, norm_pixels: bool) -> Float[Array, "batch patches values"]:
    """What is to be painted in every patch: pixels as the model takes them, or these normalised patch by patch."""
    patches = patchify(model.normalised(images), model.patch_size)
    if not norm_pixels:
        return patches
    mean, spread = patch_spread(patches)
    return (patches - mean) / spread


@dataclasses.dataclass(frozen=True)
class Mae(MaskedPixels):
    """The objective of ``config.pretext.name = "mae"``."""

    pretext_config = MaeConfig

    pretext: MaeConfig

    @classmethod
    def check(cls, pretext: MaeConfig, model: VitConfig, config: Mapping[str, Any]) -> None:
        check_ratio(pretext.mask_ratio, model.patches, "config.pretext.mask_ratio")
        if pretext.norm_pixels and model.patch_values < 2:
            raise UserError("config.pretext.norm_pixels needs patches of more than one number; expected larger ones")

    @classmethod
    def prepare(cls, config: Mapping[str, Any], tokenizer: str | None = None) -> tuple[Mae, PreparedPictures]:
        objective, data = super().prepare(config, tokenizer)
        some = jnp.asarray(some_pictures(data.eval, STATISTICS_FROM))
        targets = patch_targets(some, objective.model, norm_pixels=objective.pretext.norm_pixels)
        data.statistics["patch_variance"] = float(jnp.mean(jnp.var(targets, axis=(0, 1))))
        return objective, data

    @property
    def module(self) -> MaskedAutoencoder:
        """The Linen module."""
        return MaskedAutoencoder(self.model, self.pretext)

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        view_key, mask_key = jax.random.split(key)
        images = self.view(batch, view_key, self.pretext.augment, train=train)
        hidden = hidden_count(self.model.patches, self.pretext.mask_ratio)
        visible, hidden = split_patches(row_keys(mask_key, batch["row"]), self.model.patches, hidden)
        weights = {"reconstruction": jnp.ones(hidden.shape, jnp.float32)}
        return batch | {"image": images, "visible": visible, "hidden": hidden, "weights": weights}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        predicted = self.module.apply({"params": params}, batch, deterministic=not train, rngs={"dropout": key})
        targets = patch_targets(batch["image"], self.model, norm_pixels=self.pretext.norm_pixels)
        errors = jnp.mean((predicted - take_patches(targets, batch["hidden"])) ** 2, axis=-1)
        return Out({"reconstruction": Term(jnp.sum(batch["weights"]["reconstruction"] * errors))})

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        hidden = hidden_count(self.model.patches, self.pretext.mask_ratio)
        decoder, visible = decoder_of(self.model, self.pretext), self.model.patches - hidden
        length = self.model.front + self.model.patches
        forward = self.model.flops_per_image(visible) + decoder.flops_per_row(length, hidden)
        forward += 2 * (self.model.front + visible) * self.model.width * decoder.width
        forward += 2 * hidden * decoder.width * decoder.patch_values
        return 3.0 * batch_shapes["image"][0] * forward

    def chance(self, statistics: Mapping[str, float]) -> float | None:
        """The loss of a decoder that paints the same in every place.

        Nearly 1 with ``norm_pixels``, if no patch is blank: one of a single value is 0 after normalising.
        """
        return statistics.get("patch_variance")

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        predicted = self.module.apply({"params": params}, batch, deterministic=True)
        if self.pretext.norm_pixels:
            # To be looked at: each patch's own mean and spread, which were never asked for, are put back.
            real = patchify(self.model.normalised(batch["image"]), self.model.patch_size)
            mean, spread = patch_spread(take_patches(real, batch["hidden"]))
            predicted = predicted * spread + mean
        return reconstructed(batch, self.model.pixels(predicted), self.model.patch_size)
