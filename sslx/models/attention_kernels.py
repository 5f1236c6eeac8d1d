"""Which program computes attention: plain products, or a kernel that never writes the scores of a whole row down.

- ``xla``: `attention.attend` as it stands there, on any device, in any dtype, with dropout.
- ``cudnn``: flash attention on NVIDIA GPUs (arXiv 2205.14135), by `jax.nn.dot_product_attention`; packed rows go
  through a block-diagonal mask.
- ``splash``: its sparse form on TPUs, by `jax.experimental.pallas.ops.tpu.splash_attention`, which has segment ids.

In: a `Call`, what a call of attention is like, and what the config asks for. Out: a name. ``auto`` takes splash
attention where it can run, and ``xla`` otherwise; a name by itself is refused in one line where it cannot. Hosts of one
run must be alike, as each asks its own cuDNN.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sslx.errors import UserError, first_line

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}
AUTOMATIC = ("splash",)  # cuDNN's has not been compared with plain products on a GPU yet

BLOCK = 128  # tokens of a row that splash attention takes at a time, at least: the lanes of a TPU's vector unit
BLOCKS = (512, 256, BLOCK)
LEAST = 512  # tokens of a row from which on ``auto`` takes a kernel: in short rows there is little to save
OUTSIDE = -1  # segment of what pads a row to whole blocks: no token has it

# Of queries, keys and values; splash attention has heads before length.
AXES = ("act_batch", None, "act_heads", None)
IDS = ("act_batch", None)


@dataclasses.dataclass(frozen=True)
class Call:
    """What a call of attention is like, as far as it decides which program computes it.

    Attributes:
      platform: Of the devices: ``cpu``, ``gpu``, ``tpu``.
      dtype: Of queries, keys and values.
      queries: Tokens that ask, of a row.
      keys: Tokens that are asked, of a row.
      heads: How many.
      head_width: Features of each.
      masked: There are segments, so that not every token sees every other.
      causal: A token sees none after it.
      dropout: Some probabilities are dropped.
      split: Config keys of what the devices share and does not divide evenly, or may not be shared.
    """

    platform: str
    dtype: str
    queries: int
    keys: int
    heads: int
    head_width: int
    masked: bool
    causal: bool
    dropout: bool
    split: tuple[str, ...] = ()


def chosen(asked: str, call: Call) -> str:
    """The name of the program that computes a call: ``xla``, ``cudnn`` or ``splash``.

    Raises:
      UserError: one is asked for that cannot compute it.
    """
    if asked == "auto":
        long = call.keys >= LEAST
        return next((name for name in AUTOMATIC if long and not refused(name, call)), "xla")
    if asked != "xla" and (reason := refused(asked, call)):
        raise UserError(f"config.model.attention is {asked}, which {reason}; expected auto or xla here")
    return asked


def refused(name: str, call: Call) -> str:
    """Why a kernel cannot compute a call, as the end of a sentence; "" if it can."""
    if call.platform != PLATFORMS[name]:
        return f"runs on a {PLATFORMS[name].upper()}, and the devices are {call.platform.upper()}s"
    if call.dropout:
        return "drops no attention probabilities (config.model.attention_dropout)"
    if call.split:
        return f"needs whole rows and heads on each device, which {' and '.join(call.split)} does not leave"
    return {"cudnn": _cudnn_refuses, "splash": _splash_refuses}[name](call)


def call_of(query: Array, key: Array, *, masked: bool, causal: bool, dropout: bool) -> Call:
    """A call of attention on the devices of the mesh in force, ``[batch, length, heads, head_width]`` each."""
    mesh = jax.sharding.get_abstract_mesh()
    # The mesh may be one of devices that are not here (`sslx.plan`).
    device = None if mesh.empty else mesh.abstract_device
    names = ("act_batch", "act_length", "act_heads")
    rows, length, heads = (math.prod(mesh.shape[axis] for axis in _mesh_axes(name)) for name in names)
    divided = {"config.batch_size": query.shape[0] % rows, "config.mesh.sequence": length - 1}
    divided |= {"config.model.heads": query.shape[2] % heads}
    return Call(
        platform=device.platform if device else jax.default_backend(),
        dtype=query.dtype.name,
        queries=query.shape[1],
        keys=key.shape[1],
        heads=query.shape[2],
        head_width=query.shape[3],
        masked=masked,
        causal=causal,
        dropout=dropout,
        split=tuple(name for name, rest in divided.items() if rest),
    )


def cudnn(
    query: Float[Array, "batch queries heads head_width"],
    key: Float[Array, "batch length heads head_width"],
    value: Float[Array, "batch length heads head_width"],
    segment_ids: tuple[Int[Array, "batch queries"], Int[Array, "batch length"]] | None,
    *,
    causal: bool,
) -> Float[Array, "batch queries heads head_width"]:
    """Flash attention by cuDNN; arguments as of `attention.attend`.

    Packed rows cost two arrays ``[batch, 1, queries, length]`` a layer: the mask as a bias, and in the backward pass
    its gradient, which nobody uses.
    """

    def attend(query: Array, key: Array, value: Array, *ids: Array) -> Array:
        # It takes lengths of rows, and no segments: theirs is a bias of one head for all.
        mask = ids[0][:, None, :, None] == ids[1][:, None, None, :] if ids else None
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation="cudnn")

    return _on_each_device(attend, query, key, value, *(segment_ids or ()))


def splash(
    query: Float[Array, "batch queries heads head_width"],
    key: Float[Array, "batch length heads head_width"],
    value: Float[Array, "batch length heads head_width"],
    segment_ids: tuple[Int[Array, "batch queries"], Int[Array, "batch length"]] | None,
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[Array, "batch queries heads head_width"]:
    """Splash attention; arguments as of `attention.attend`, and ``interpret`` to run it where there is no TPU.

    Queries that do not fill a block, as the picked positions of a row do not, are padded to one.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention  # which takes a while

    queries, keys = query.shape[1], key.shape[1]
    missing = -queries % BLOCK

    def attend(query: Array, key: Array, value: Array, *ids: Array) -> Array:
        heads, width = query.shape[2:]
        query = jnp.pad(query * width**-0.5, ((0, 0), (0, missing), (0, 0), (0, 0)))
        kernel = _splash_kernel(heads, queries + missing, keys, causal, interpret)
        query, key, value = (jnp.swapaxes(array, 1, 2) for array in (query, key, value))
        if ids:
            asking = jnp.pad(ids[0], ((0, 0), (0, missing)), constant_values=OUTSIDE)
            ids = (splash_attention.SegmentIds(asking, ids[1]),)
        out = jax.vmap(kernel)(query, key, value, *ids)
        return jnp.swapaxes(out, 1, 2)[:, :queries]

    return _on_each_device(attend, query, key, value, *(segment_ids or ()))


KERNELS = {"cudnn": cudnn, "splash": splash}


def _splash_kernel(heads: int, queries: int, keys: int, causal: bool, interpret: bool) -> Callable:
    from jax.experimental.pallas.ops.tpu import splash_attention

    block_q, block_kv = (next(size for size in BLOCKS if length % size == 0) for length in (queries, keys))
    sizes = splash_attention.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    kind = splash_attention.CausalMask if causal else splash_attention.FullMask
    mask = splash_attention.MultiHeadMask([kind((queries, keys))] * heads)
    return splash_attention.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


def _splash_refuses(call: Call) -> str:
    if call.keys % BLOCK:
        return f"takes rows of a multiple of {BLOCK} tokens, and these have {call.keys}"
    return ""


def _cudnn_refuses(call: Call) -> str:
    if call.dtype not in ("bfloat16", "float16"):
        return f"computes in bfloat16, and config.model.dtype is {call.dtype}"
    if call.head_width % 8 or call.head_width > 256:
        return f"takes heads of a multiple of 8 features, at most 256, and these have {call.head_width}"
    if call.masked and (call.queries % 2 or call.keys % 2):
        return f"takes packed rows of an even number of tokens, and these have {call.keys}, {call.queries} of which ask"
    # In a thread: what is current in this one, a mesh and what is being traced, is none of its business.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        said = pool.submit(_cudnn_says, dataclasses.replace(call, platform="gpu")).result()
    return f"does not take this shape ({said})" if said else ""


@functools.lru_cache(maxsize=64)
def _cudnn_says(call: Call) -> str:
    """What cuDNN has against a call, forward or backward: that depends on its version and the card, so it is asked."""

    def loss(query: Array, key: Array, value: Array, *ids: Array) -> Array:
        return jnp.sum(cudnn(query, key, value, ids or None, causal=call.causal).astype(jnp.float32))

    # Two rows: with one, the mask could be the same for all, which is another program.
    def shape(length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2, length, call.heads, call.head_width), call.dtype)

    ids = [jax.ShapeDtypeStruct((2, length), jnp.int32) for length in (call.queries, call.keys)] if call.masked else []
    try:
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        step.lower(shape(call.queries), shape(call.keys), shape(call.keys), *ids).compile()
    except Exception as error:  # its own errors, XLA's and jax's have no common class
        return first_line(error)
    return ""


def _on_each_device(attend: Callable, query: Array, key: Array, value: Array, *ids: Array) -> Array:
    """Runs a kernel, which the compiler cannot divide, on each device's rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(query, key, value, *ids)
    of_rows, of_ids = (nn.logical_to_mesh_axes(names) for names in (AXES, IDS))
    specs = (of_rows, of_rows, of_rows, *(of_ids for _ in ids))
    return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=of_rows, check_vma=False)(query, key, value, *ids)


def _mesh_axes(name: str) -> tuple[str, ...]:
    """The axes of the mesh that a logical axis is divided over; none outside `on_mesh`."""
    axes = nn.logical_to_mesh_axes((name,))[0]
    return () if axes is None else (axes,) if isinstance(axes, str) else axes
