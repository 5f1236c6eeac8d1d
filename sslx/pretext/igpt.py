"""Autoregressive pixels (iGPT, Chen et al. 2020): predict each pixel's colour from those before it.

In: pictures. Views: a random crop; each pixel becomes the nearest colour of a codebook of k-means centres, made from
training pixels when the run begins. Out: one term, a mean over pixels, in nats; ``bits_per_dim`` is the same in bits
and for each channel. Where the codebook holds every value that a grey pixel can have, it is the lossless code length;
with fewer colours it is that of the quantised picture and not to be compared with others.

During training, the lower halves of held-out pictures are painted anew.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from sklearn.cluster import KMeans

from sslx.augment.policy import AugmentConfig
from sslx.data.prepared import PreparedPictures
from sslx.errors import UserError
from sslx.models.generation import Sampling, generate
from sslx.models.igpt import IgptConfig, IgptEncoder, nearest_colours
from sslx.models.layers import padded_vocabulary, tied_logits
from sslx.models.losses import chunks_for, tied_cross_entropy
from sslx.models.pixels import unit
from sslx.objective import Batch, Mean, Out, Term, Variables, row_keys
from sslx.picture_sheet import sheet
from sslx.pretext.image import ImagePretext, some_pictures

PIXELS_FROM = 512  # pictures
PIXELS = 100_000  # that k-means sees


@dataclasses.dataclass(frozen=True)
class IgptPretextConfig:
    """``config.pretext`` of ``name="igpt"``."""

    name: str = "igpt"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)

    def __post_init__(self):
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        """How samples are drawn."""
        return Sampling(self.temperature, self.top_k, self.top_p)


@dataclasses.dataclass(frozen=True)
class Igpt(ImagePretext):
    """The objective of ``config.pretext.name = "igpt"``; ``codebook`` is what a fresh encoder begins with."""

    pretext_config = IgptPretextConfig
    models = ("igpt",)

    pretext: IgptPretextConfig
    model: IgptConfig
    codebook: tuple[tuple[float, ...], ...] | None = None

    @classmethod
    def prepare(cls, config: Mapping[str, Any], tokenizer: str | None = None) -> tuple[Igpt, PreparedPictures]:
        objective, data = super().prepare(config, tokenizer)
        codebook = _codebook(data.train, objective.model.colours, config["seed"])
        data.statistics["colour_entropy"] = _colour_entropy(data.eval, codebook)
        return dataclasses.replace(objective, codebook=tuple(map(tuple, codebook.tolist()))), data

    @property
    def _vocab_size(self) -> int:
        return self.model.colours + 1

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        def whole(encoder: IgptEncoder, batch: Batch) -> Array:
            # Features stop at a middle layer, and predictions go on to the last norm.
            return encoder(encoder.row(encoder.tokens(batch["image"])), deterministic=True)

        encoder = self.model.encoder().init(key, batch, method=whole)["params"]
        if self.codebook is not None:
            encoder["codebook"] = encoder["codebook"].replace_boxed(jnp.array(self.codebook, jnp.float32))
        return {"params": {"encoder": encoder}, "state": {}}

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        images = self.view(batch, key, self.pretext.augment, train=train)
        weights = {"igpt": jnp.ones((images.shape[0], self.model.length), jnp.float32)}
        return batch | {"image": images, "weights": weights}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        encoder, weights = self.model.encoder().bind({"params": params["encoder"]}), batch["weights"]["igpt"]
        targets = encoder.tokens(batch["image"])
        row = encoder.row(targets)
        x = self.model.encoder().apply(
            {"params": params["encoder"]}, row, deterministic=not train, rngs={"dropout": key}
        )
        chunks = chunks_for(self.model.length, self._vocab_size)
        table = params["encoder"]["embeddings"]["word"]
        total, right = tied_cross_entropy(x, table, targets, weights, self._vocab_size, chunks)
        return Out({"igpt": Term(total)}, {"accuracy": Mean(right, jnp.sum(weights))})

    def logits(self, params: Any, state: Any, batch: Batch) -> Float[Array, "batch length tokens"]:
        encoder = self.model.encoder().bind({"params": params["encoder"]})
        x = encoder(encoder.row(encoder.tokens(batch["image"])), deterministic=True)
        return tied_logits(x, params["encoder"]["embeddings"]["word"], self._vocab_size)[..., : self._vocab_size]

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        head = 2 * self.model.length * self.model.width * padded_vocabulary(self._vocab_size)
        return 3.0 * batch_shapes["image"][0] * (self.model.flops_per_image() + head)

    def chance(self, statistics: Mapping[str, float]) -> float | None:
        """The entropy of the held-out pixels' colours."""
        return statistics.get("colour_entropy")

    def derive(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {"bits_per_dim": metrics["loss"] / math.log(2) / self.model.channels}

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        encoder = self.model.encoder().bind({"params": params["encoder"]})
        tokens = encoder.tokens(batch["image"])
        half = self.model.length // 2
        keys = row_keys(jax.random.key(0), batch["row"])
        below = self.drawn(params, tokens[:, :half], keys)
        painted = jnp.concatenate([tokens[:, :half], below], axis=1)
        sampled = self.drawn(params, tokens[:, :0], keys)
        pictures = {"picture": tokens, "lower half painted": painted, "sample": sampled}
        return {name: self._picture(params, of) for name, of in pictures.items()}

    def drawn(self, params: Any, above: Int[Array, "batch given"], keys: PRNGKeyArray) -> Int[Array, "batch rest"]:
        """The colours of the pixels that follow the given ones."""
        rows, given = above.shape
        start = jnp.full((rows, 1), self.model.start, jnp.int32)
        prompts = {
            "tokens": jnp.concatenate([start, above], axis=1),
            "segment_ids": jnp.ones((rows, given + 1), jnp.int32),
            "positions": jnp.broadcast_to(jnp.arange(given + 1, dtype=jnp.int32), (rows, given + 1)),
        }
        return generate(
            self.model,
            self._vocab_size,
            params["encoder"],
            prompts,
            keys,
            new_tokens=self.model.length - given,
            sampling=self.pretext.sampling,
            end_id=self.model.start,
            forbidden=(self.model.start,),
        )

    def _picture(self, params: Any, tokens: Int[Array, "batch length"]) -> Float[Array, "batch h w channels"]:
        side = self.model.image_size
        return params["encoder"]["codebook"][tokens].reshape(-1, side, side, self.model.channels)

    def pictures(self, predictions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"samples": sheet(predictions, across=2)}

    def preview_pictures(
        self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        codebook = jnp.array(self.codebook, jnp.float32)
        colours = np.asarray(codebook[nearest_colours(jnp.asarray(viewed["image"]), codebook)])
        shown = {
            "picture": batch["image"],
            "view": viewed["image"],
            "its colours": colours.reshape(viewed["image"].shape),
        }
        return {"views": sheet(shown)}


def _codebook(rows: Any, colours: int, seed: int) -> Float[np.ndarray, "colours channels"]:
    """K-means centres of training pixels in [0, 1], sorted; all values there are where these are no more.

    Raises:
      UserError: the pictures have fewer colours.
    """
    some = some_pictures(rows, PIXELS_FROM)
    pixels = some.reshape(-1, some.shape[-1])
    if pixels.shape[1] == 1 and colours == 256:
        return np.arange(256, dtype=np.float32)[:, None] / 255
    drawn = np.random.default_rng(seed).permutation(len(pixels))[:PIXELS]
    values = pixels[drawn].astype(np.float32) / 255
    different = np.unique(values, axis=0)
    if len(different) < colours:
        raise UserError(
            f"config.model.colours is {colours}, and the training pictures have {len(different)}; expected at most that"
        )
    centres = KMeans(colours, n_init=1, random_state=seed).fit(values).cluster_centers_
    return centres[np.lexsort(centres.T)].astype(np.float32)


def _colour_entropy(rows: Any, codebook: Float[np.ndarray, "colours channels"]) -> float:
    some = some_pictures(rows, PIXELS_FROM)
    tokens = np.asarray(nearest_colours(unit(jnp.asarray(some)), jnp.asarray(codebook)))
    share = np.bincount(tokens.ravel(), minlength=len(codebook)) / tokens.size
    return float(-np.sum(share[share > 0] * np.log(share[share > 0])))
