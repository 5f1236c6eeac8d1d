"""What stands on an encoder in joint embedding and is thrown away: projectors, predictors, prototypes.

In: one vector a view. Out: float32. Batch normalisation takes the mean and variance of all rows of the global batch on
any mesh, since the step is one program over global arrays; its running averages are in ``batch_stats``.
"""

from __future__ import annotations

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sslx.errors import UserError, choose
from sslx.models.layers import Dense, activation
from sslx.models.pooling import unit_vectors

# PyTorch's default for linear layers, which the published heads have: uniform, up to 1 / sqrt(inputs).
linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# DINO's heads, which have GELU: a deviation of 0.02 for 2,048 inputs, brought to any number of them.
dino_init = nn.initializers.variance_scaling(0.02**2 * 2048, "fan_in", "truncated_normal")
INITS = {"relu": linear_init, "gelu": dino_init}  # by activation


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """An MLP. A dense layer has a bias where no batch normalisation follows, which would take it away again."""

    layers: int = 2  # dense layers; 0: the vector as it is
    hidden: int = 2048  # width of all but the last
    out: int = 256  # width of the last
    norm: bool = True  # batch normalisation after each layer but the last
    last_norm: bool = False  # batch normalisation after the last, without scale and bias
    activation: str = "relu"  # relu | gelu, after each layer but the last

    def __post_init__(self):
        if self.layers < 0:
            raise UserError(f"a head's layers are {self.layers}; expected at least 0")
        if min(self.hidden, self.out) < 1:
            raise UserError(f"a head's hidden is {self.hidden} and its out {self.out}; expected at least 1 of both")
        choose(self.activation, INITS, "activation of a head")

    @property
    def batch_norm(self) -> bool:
        """Whether a row's output in training depends on the others of its batch."""
        return bool(self.layers) and (self.last_norm or (self.norm and self.layers > 1))

    @property
    def widths(self) -> list[int]:
        """Of each layer's output."""
        return [self.hidden] * (self.layers - 1) + [self.out] * bool(self.layers)

    def width(self, inputs: int) -> int:
        """Of the output, given vectors of so many numbers."""
        return self.out if self.layers else inputs

    def flops(self, inputs: int) -> float:
        """Forward FLOPs of one vector of so many numbers."""
        widths = [inputs, *self.widths]
        return 2.0 * sum(before * after for before, after in itertools.pairwise(widths))


class Head(nn.Module):
    """The MLP of a `HeadConfig`."""

    config: HeadConfig

    @nn.compact
    def __call__(self, x: Float[Array, "rows inputs"], *, deterministic: bool) -> Float[Array, "rows outputs"]:
        """``deterministic`` normalises by the running averages."""
        config, x = self.config, x.astype(jnp.float32)
        for layer, width in enumerate(config.widths):
            last = layer == config.layers - 1
            norm = config.last_norm if last else config.norm
            axes = ("mlp", "embed") if layer % 2 else ("embed", "mlp")
            x = Dense(width, axes, use_bias=not norm, kernel_init=INITS[config.activation], name=f"layer_{layer}")(x)
            if norm:
                x = batch_norm(f"layer_{layer}_norm", deterministic, plain=last)(x)
            x = x if last else activation(config.activation)(x)
        return x


def batch_norm(name: str, deterministic: bool, *, plain: bool) -> nn.BatchNorm:
    """Batch normalisation of vectors; ``plain``: without scale and bias."""
    return nn.BatchNorm(
        use_running_average=deterministic,
        momentum=0.9,
        epsilon=1e-5,
        use_scale=not plain,
        use_bias=not plain,
        use_fast_variance=False,  # a difference of large squares would lose what a nearly collapsed feature has left
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )


class Prototypes(nn.Module):
    """Cosines with learned directions: SwAV's prototypes, and DINO's weight-normalised last layer with gains of 1.

    SwAV's code brings its weights back to length 1 after each update; here their length has no say at all.
    """

    count: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "rows width"], frozen: Bool[Array, ""] | None = None
    ) -> Float[Array, "rows prototypes"]:
        """``frozen``: no gradient reaches the directions, which then stay, as weight decay leaves them as they are."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")  # lengths of about 1
        kernel = self.param("kernel", nn.with_logical_partitioning(init, ("embed", "vocab")), (x.shape[-1], self.count))
        directions = unit_vectors(kernel.T)
        if frozen is not None:
            directions = jnp.where(frozen, jax.lax.stop_gradient(directions), directions)
        return jnp.einsum("nd,kd->nk", unit_vectors(x), directions, precision=jax.lax.Precision.HIGHEST)
