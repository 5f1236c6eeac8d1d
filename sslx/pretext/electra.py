"""Replaced-token detection (ELECTRA, arXiv 2003.10555): a small generator fills masks, the encoder tells what is false.

In: rows of tokens, segment ids and positions. Views: masks drawn inside jit (of the picked, 85 % become [MASK] and the
rest stay, as in google-research/electra), and a key a row for the generator's samples. Out: two named terms, ``mlm`` of
the generator (a mean over picked tokens) and ``discriminator`` (binary cross-entropy, a mean over all tokens but
padding, times 50). A token that the generator has guessed right counts as original.

Generator and discriminator share their embeddings (words, positions, token types and their norm, as in the published
code), each with a projection to its own width; nothing else, and no gradient passes through the sampled tokens. The
generator is thrown away: the product is the discriminator, ``params["encoder"]``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from sslx.errors import UserError
from sslx.models.bert import BertConfig, BertEncoder, DiscriminatorHead, MaskedTokenHead, embedded, glorot_init
from sslx.models.layers import Dense, padded_vocabulary
from sslx.models.losses import softmax_cross_entropy
from sslx.models.pooling import mean_pool
from sslx.models.transformer import Transformer
from sslx.objective import Batch, Mean, Out, Term, Variables, row_keys
from sslx.pretext.masking import mask_tokens, masking_table, picked_count
from sslx.pretext.text import TextPretext


@dataclasses.dataclass(frozen=True)
class ElectraConfig:
    """``config.pretext`` of ``name="electra"``."""

    name: str = "electra"
    mask_ratio: float = 0.15
    eval_mask_ratio: float = 0.15
    generator_width: float = 0.25  # share of the discriminator's width, heads and MLP width
    discriminator_weight: float = 50.0  # of its term; the generator's is 1

    def __post_init__(self):
        for name in ("mask_ratio", "eval_mask_ratio"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"config.pretext.{name} is {getattr(self, name)}; expected a share between 0 and 1")
        if not 0 < self.generator_width <= 1:
            raise UserError(
                f"config.pretext.generator_width is {self.generator_width}; expected a share above 0, at most 1"
            )
        if not self.discriminator_weight > 0:
            raise UserError(f"config.pretext.discriminator_weight is {self.discriminator_weight}; expected more than 0")


def generator_of(model: BertConfig, share: float) -> BertConfig:
    """The generator that goes with a discriminator: as deep, narrower, on the same embeddings.

    Raises:
      UserError: its width has no heads that the positions allow.
    """
    width, even = round(model.width * share), 2 if model.positions == "rope" else 1
    heads = [h for h in range(1, max(1, round(model.heads * share)) + 1) if width and width % (h * even) == 0]
    if not heads:
        raise UserError(
            f"config.pretext.generator_width {share:g} of config.model.width {model.width} is {width}; "
            f"expected {'an even width' if even == 2 else 'a width of at least 1'}"
        )
    mlp_width = max(1, round(model.mlp_width * share))
    return dataclasses.replace(model, width=width, heads=heads[-1], mlp_width=mlp_width, embed_width=model.table_width)


class Generator(nn.Module):
    """A narrow transformer on the discriminator's embeddings, with a masked-token head."""

    config: BertConfig
    vocab_size: int

    def setup(self):
        if self.config.table_width != self.config.width:
            self.project = Dense(
                self.config.width, (None, "embed"), kernel_init=glorot_init, dtype=self.config.compute_dtype
            )
        self.transformer = Transformer(self.config)
        self.mlm_head = MaskedTokenHead(self.config, self.vocab_size)

    def __call__(
        self,
        x: Float[Array, "batch length table_width"],
        word_table: Float[Array, "padded_vocab table_width"],
        batch: Batch,
        *,
        deterministic: bool,
    ) -> Float[Array, "batch picked padded_vocab"]:
        x = self.project(x) if self.config.table_width != self.config.width else x
        at = (batch["segment_ids"], batch["positions"], batch["picked"])
        return self.mlm_head(self.transformer(x, *at, deterministic=deterministic), word_table)


class ElectraForPretraining(nn.Module):
    """The discriminator's encoder and head, and the generator."""

    config: BertConfig
    generator_config: BertConfig
    vocab_size: int

    def setup(self):
        self.encoder = BertEncoder(self.config, self.vocab_size)
        self.generator = Generator(self.generator_config, self.vocab_size)
        self.discriminator_head = DiscriminatorHead(self.config)

    def generate(self, batch: Batch, *, deterministic: bool) -> Float[Array, "batch picked padded_vocab"]:
        """The generator's logits at the picked positions of the masked rows."""
        embeddings = self.encoder.embeddings
        x = embeddings.summed(*embedded(batch | {"tokens": batch["masked"]}, self.config), deterministic=deterministic)
        return self.generator(x, embeddings.word, batch, deterministic=deterministic)

    def discriminate(self, batch: Batch, *, deterministic: bool) -> Float[Array, "batch length"]:
        """The discriminator's logits of each token's having been replaced."""
        return self.discriminator_head(self.encoder(batch, deterministic=deterministic))

    def __call__(
        self, batch: Batch, *, deterministic: bool
    ) -> tuple[Float[Array, "batch picked padded_vocab"], Int[Array, "batch length"], Float[Array, "batch length"]]:
        """The generator's logits, the rows with its samples in them, and the discriminator's logits on these."""
        generated = self.generate(batch, deterministic=deterministic)
        tokens = fill_in(batch, sample(generated, batch["draw"]))
        return generated, tokens, self.discriminate(batch | {"tokens": tokens}, deterministic=deterministic)


def sample(
    logits: Float[Array, "batch picked padded_vocab"], draw: UInt32[Array, "batch words"]
) -> Int[Array, "batch picked"]:
    """Tokens drawn from the softmax of the logits, by Gumbel-max, with the random bits of each row's own key.

    No gradient: an argmax has none.
    """
    noise = jax.vmap(lambda row: jax.random.gumbel(jax.random.wrap_key_data(row), logits.shape[1:]))(draw)
    noise = nn.with_logical_constraint(noise, ("act_batch", None, "act_vocab"))
    return jnp.argmax(jax.lax.stop_gradient(logits) + noise, axis=-1).astype(jnp.int32)


def fill_in(batch: Batch, sampled: Int[Array, "batch picked"]) -> Int[Array, "batch length"]:
    """The original rows with samples at the picked positions (those that only fill up the count stay)."""
    kept = jnp.where(batch["weights"]["mlm"] > 0, sampled, batch["targets"])
    put = lambda row, at, new: row.at[at].set(new.astype(row.dtype), unique_indices=True)  # noqa: E731
    return jax.vmap(put)(batch["tokens"], batch["picked"], kept)


def binary_entropy(share: float) -> float:
    """Nats of a draw that says yes with this probability."""
    return -sum(p * math.log(p) for p in (share, 1 - share) if p > 0)


@dataclasses.dataclass(frozen=True)
class Electra(TextPretext):
    """The objective of ``config.pretext.name = "electra"``."""

    pretext_config = ElectraConfig
    remedies: ClassVar[Mapping[str, str]] = {
        "no_learning": "a lower learning rate or a longer warm-up; a smaller config.pretext.generator_width if "
        "eval/discriminator_gain is 0, as it is where the discriminator has one answer for all tokens"
    }

    pretext: ElectraConfig
    model: BertConfig  # the discriminator's

    @classmethod
    def check(cls, pretext: ElectraConfig, model: BertConfig, config: Mapping[str, Any]) -> None:
        generator_of(model, pretext.generator_width)

    @property
    def generator(self) -> BertConfig:
        """The generator's shape."""
        return generator_of(self.model, self.pretext.generator_width)

    @property
    def module(self) -> ElectraForPretraining:
        """The Linen module."""
        return ElectraForPretraining(self.model, self.generator, self.vocabulary.size)

    def init(self, key: PRNGKeyArray, batch: Batch) -> Variables:
        viewed = self.views(batch, key, jnp.zeros((), jnp.int32), train=True)
        return {"params": self.module.init(key, viewed, deterministic=True)["params"], "state": {}}

    def views(self, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Batch:
        ratio = self.pretext.mask_ratio if train else self.pretext.eval_mask_ratio
        mask_key, draw_key = jax.random.split(key)
        masked = mask_tokens(batch, mask_key, self.vocabulary, ratio, hidden=0.85, noise=0.0)
        weights = {"mlm": masked["weights"], "discriminator": (batch["segment_ids"] > 0).astype(jnp.float32)}
        added = {
            "masked": masked["tokens"],
            "picked": masked["positions"],
            "targets": masked["targets"],
            # Drawn here and not in the loss, whose key is another in each micro-batch.
            "draw": jax.random.key_data(row_keys(draw_key, batch["row"])),
        }
        return batch | added | {"weights": weights}

    def loss(self, params: Any, state: Any, batch: Batch, key: PRNGKeyArray, step: Array, *, train: bool) -> Out:
        generated, tokens, logits = self.module.apply(
            {"params": params}, batch, deterministic=not train, rngs={"dropout": key}
        )
        picked, real = batch["weights"]["mlm"], batch["weights"]["discriminator"]
        replaced = (tokens != batch["tokens"]).astype(jnp.float32)
        terms = {
            "mlm": Term(jnp.sum(picked * softmax_cross_entropy(generated, batch["targets"]))),
            "discriminator": Term(
                # log(1 + exp(x)) - label x, which is -log sigmoid of the right sign.
                jnp.sum(real * (jax.nn.softplus(logits) - replaced * logits)),
                self.pretext.discriminator_weight,
            ),
        }
        said = (logits > 0).astype(jnp.float32)
        guessed = (jnp.argmax(generated, axis=-1) == batch["targets"]).astype(jnp.float32)
        found = jnp.sum(real * said * replaced)
        metrics = {
            "mlm_accuracy": Mean(jnp.sum(picked * guessed), jnp.sum(picked)),
            "accuracy": Mean(jnp.sum(real * (said == replaced)), jnp.sum(real)),
            "precision": Mean(found, jnp.sum(real * said)),
            "recall": Mean(found, jnp.sum(real * replaced)),  # 0: it calls everything original
            "replaced": Mean(jnp.sum(real * replaced), jnp.sum(real)),
        }
        return Out(terms, metrics)

    @classmethod
    def encoder(cls, params: Any, state: Any) -> Variables:
        return {"params": params["encoder"]}

    def encode(self, variables: Variables, batch: Batch) -> Float[Array, "batch dim"]:
        x = BertEncoder(self.model, self.vocabulary.size).apply(variables, batch, deterministic=True)
        return mean_pool(x, batch["segment_ids"])

    def logits(self, params: Any, state: Any, batch: Batch) -> Float[Array, "batch length"]:
        """The discriminator's: above 0 where a token is held to be replaced."""
        return self.module.apply({"params": params}, batch, deterministic=True, method="discriminate")

    def variant(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        return batch | {"tokens": self.views(batch, key, jnp.zeros((), jnp.int32), train=True)["masked"]}

    def flops(self, batch_shapes: Mapping[str, tuple[int, ...]]) -> float:
        rows, length = batch_shapes["tokens"]
        table, picked = self.model.table_width, picked_count(length, self.pretext.mask_ratio)
        forward = 2 * length * self.model.width * (self.model.width + 1)
        for model, queries in ((self.model, None), (self.generator, picked)):
            forward += model.flops_per_row(length, queries)
            forward += 2 * length * table * model.width if model.width != table else 0
        forward += 2 * picked * table * (self.generator.width + padded_vocabulary(self.vocabulary.size))
        return 3.0 * rows * forward

    def chance(self, statistics: Mapping[str, float]) -> float | None:
        """The loss where both guess: the generator by the tokens' frequencies, the discriminator by one share.

        That share is how often a token drawn by frequency is another than the one it replaces, taken from its bound:
        two draws agree with probability at least exp(-entropy). It is the value to start below and no proof that the
        discriminator learns, since a better generator leaves fewer tokens replaced and lowers this guess too. What
        tells is ``discriminator_gain`` (0 where it has collapsed to one answer for all tokens) and ``recall``.
        """
        entropy = statistics.get("unigram_entropy")
        if entropy is None:
            return None
        share = self.pretext.eval_mask_ratio * (1 - math.exp(-entropy))
        return entropy + self.pretext.discriminator_weight * binary_entropy(share)

    def derive(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {
            # exp overflows a float above 709; a loss that high has no meaningful perplexity.
            "perplexity": math.exp(min(metrics["mlm"], 700.0)),
            # Nats a token better than answering each with the share of replaced ones.
            "discriminator_gain": binary_entropy(metrics["replaced"]) - metrics["discriminator"],
        }

    def predict(self, params: Any, state: Any, batch: Batch) -> dict[str, Array]:
        _, tokens, logits = self.module.apply({"params": params}, batch, deterministic=True)
        kept = {name: batch[name] for name in ("tokens", "segment_ids")}
        return kept | {"sampled": tokens, "probabilities": jax.nn.sigmoid(logits)}

    def show(self, predictions: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        rows = []
        for tokens, segments, sampled, probabilities in zip(
            *(predictions[name] for name in ("tokens", "segment_ids", "sampled", "probabilities")), strict=True
        ):
            changed = np.flatnonzero((tokens != sampled) & (segments > 0))
            if not len(changed):
                continue
            place, calm = changed[0], np.where((tokens == sampled) & (segments > 0), probabilities, -1.0)
            around = sampled[max(0, place - 12) : place + 13]
            say = self.tokenizer.decode
            rows.append(
                {
                    "text": say([t for t in around if t != self.vocabulary.pad_id]),
                    "replaced": f"{say([tokens[place]])} by {say([sampled[place]])}",
                    "held false": f"{probabilities[place]:.2f}",
                    "most doubted original": f"{say([tokens[calm.argmax()]])} {calm.max():.2f}",
                }
            )
        return rows

    def preview(self, batch: Mapping[str, np.ndarray], viewed: Mapping[str, np.ndarray]) -> list[dict[str, str]]:
        """What the generator will see; what the discriminator will, the generator decides."""
        return masking_table(self.tokenizer, batch, viewed["masked"], viewed["picked"], viewed["weights"]["mlm"])
