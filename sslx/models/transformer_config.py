"""The shape of one stack of transformer blocks, and how it starts and is computed: what `config.model` says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sslx.errors import UserError, choose
from sslx.models.attention_kernels import IMPLEMENTATIONS, PLATFORMS
from sslx.models.layers import Initializer, bert_init

REMAT = {
    "none": None,  # keep every activation
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep products with weights, redo the rest
    "full": jax.checkpoint_policies.nothing_saveable,  # keep layer inputs only
}


def computed_by(attention: str, model: Mapping[str, Any]) -> Mapping[str, Any]:
    """A written model, if it has attention with another choice of what computes it: where a run was trained says
    nothing about where it is used."""
    return {**model, "attention": attention} if "heads" in model else model


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """One stack of blocks. Defaults are BERT's block at its "mini" size."""

    causal: ClassVar[bool] = False  # a token sees itself and those before it
    position_kinds: ClassVar[tuple[str, ...]] = ("learned", "rope")

    layers: int = 4
    width: int = 256
    heads: int = 4
    mlp_width: int = 1024
    norm_position: str = "post"  # post (BERT) | pre
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_eps: float = 1e-12
    activation: str = "gelu"  # gelu (exact) | gelu_tanh | relu | silu
    glu: bool = False  # gate the MLP: activation(x W) * (x V), mlp_width each (arXiv 2002.05202)
    bias: bool = True
    qk_norm: bool = False  # RMS-normalise queries and keys of each head (arXiv 2010.04245, 2302.05442)
    positions: str = "learned"  # learned | rope
    rope_theta: float = 10000.0
    dropout: float = 0.1
    attention_dropout: float = 0.1
    drop_path: float = 0.0  # share of rows whose branch the last layer skips; rises from 0 (arXiv 1603.09382)
    layer_scale: float = 0.0  # first value of a factor for each feature of a branch (arXiv 2103.17239); 0: none
    remat: str = "none"  # none | dots | full
    unroll: bool | None = None  # unroll the scan over layers; None: on CPU only
    attention: str = "auto"  # auto | xla | cudnn (GPU, bfloat16) | splash (TPU): what computes it
    dtype: str = "float32"  # computation; parameters are always float32

    def __post_init__(self):
        for name in ("layers", "width", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise UserError(f"config.model.{name} is {getattr(self, name)}; expected at least 1")
        for name in ("dropout", "attention_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"config.model.{name} is {getattr(self, name)}; expected 0 or a share below 1")
        if self.layer_scale < 0:
            raise UserError(f"config.model.layer_scale is {self.layer_scale}; expected at least 0")
        if self.width % self.heads:
            even = [heads for heads in range(1, self.width + 1) if self.width % heads == 0]
            near = sorted(sorted(even, key=lambda heads: abs(heads - self.heads))[:2])
            raise UserError(
                f"config.model.width {self.width} is not divisible by config.model.heads {self.heads}; "
                f"nearest that divide it: {', '.join(map(str, near))}"
            )
        if self.positions == "rope" and (self.width // self.heads) % 2:
            raise UserError(f"config.model.positions=rope needs an even head width; got {self.width // self.heads}")
        choose(self.norm_position, ("post", "pre"), "config.model.norm_position")
        choose(self.norm, ("layernorm", "rmsnorm"), "config.model.norm")
        choose(self.activation, ("gelu", "gelu_tanh", "relu", "silu"), "config.model.activation")
        choose(self.positions, self.position_kinds, "config.model.positions")
        choose(self.remat, REMAT, "config.model.remat")
        choose(self.dtype, ("float32", "bfloat16"), "config.model.dtype")
        choose(self.attention, IMPLEMENTATIONS, "config.model.attention")
        if self.attention_dropout and self.attention in PLATFORMS:
            raise UserError(
                f"config.model.attention is {self.attention}, which drops no attention probabilities; expected auto or "
                f"xla, or a dropout of 0 instead of {self.attention_dropout} (config.model.attention_dropout, or "
                "config.task.dropout)"
            )

    @property
    def compute_dtype(self) -> Any:
        """The dtype of activations."""
        return jnp.dtype(self.dtype)

    @property
    def batch_norm(self) -> bool:
        """Whether a row's features in training depend on the others of its batch."""
        return False

    @property
    def features_width(self) -> int:
        """Numbers in a row's features."""
        return self.width

    @property
    def kernel_init(self) -> Initializer:
        """How dense kernels and embeddings start."""
        return bert_init

    @property
    def residual_init(self) -> Initializer:
        """How the kernels start that write to the residual stream."""
        return self.kernel_init

    def flops_per_row(self, length: int, picked: int | None = None) -> float:
        """Forward FLOPs of the stack for one row (attention counted in full, no masking).

        Args:
          length: Tokens in the row.
          picked: How many positions the last layer is computed for; None: all.
        """
        keys_values = 4 * length * self.width**2

        def layer(queries: int) -> float:
            attention = 4 * queries * self.width**2 + 4 * queries * length * self.width
            return keys_values + attention + (6 if self.glu else 4) * queries * self.width * self.mlp_width

        return (self.layers - 1) * layer(length) + layer(length if picked is None else picked)
