"""Where every array lives: one table for parameters, one for activations, and the mesh they map to.

Models name their axes; nothing else in the tree knows mesh axes. One table for both would let the order of its rules
decide whether ``embed`` of an activation or of a parameter takes ``fsdp``, and the batch would end up unsharded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sslx.errors import UserError, first_line
from sslx.settings import MeshConfig

BATCH_AXES = ("data", "fsdp")

PARAMETER_AXES = {
    "layers": None,  # [layers, ...]: scanned, never split
    "embed": "fsdp",  # the model's width: ZeRO-3
    "mlp": "tensor",  # the MLP's inner width
    "heads": "tensor",  # heads * head_dim
    "vocab": "tensor",  # padded vocabulary
    "length": None,  # position table rows
    "types": None,  # token types, classes: too few to split
    "norm": None,  # scales and biases over the width: too small to split
}

ACTIVATION_AXES = {
    "act_batch": BATCH_AXES,  # rows
    "act_length": "sequence",  # positions in a row
    "act_keys": None,  # positions attended to: gathered, so that every query sees its whole row
    "act_embed": None,  # residual stream
    "act_mlp": "tensor",  # inside the MLP
    "act_heads": "tensor",  # inside attention
    "act_vocab": "tensor",  # logits
}

RULES = tuple({**PARAMETER_AXES, **ACTIVATION_AXES}.items())


AXES = ("data", "fsdp", "sequence", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices with axes data, fsdp, sequence and tensor.

    Where the devices are in groups with a fast network inside and a slow one between them (TPU slices, GPU nodes), the
    batch axes cross it: data first, whose traffic is once a step, then fsdp.

    Raises:
      UserError: the axes' product is not the number of devices, or tensor or sequence would have to cross groups.
    """
    devices = list(devices) if devices is not None else jax.devices()
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    written = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        hint = ""
        if sizes["data"] == -1 and len(free) > 1:  # nobody wrote that one
            hint = "; config.mesh.data is -1 unless given: --config.mesh.data=1, or another size, beside the other -1"
        raise UserError(f"config.mesh is {written}; expected positive sizes and at most one -1{hint}")
    if free:
        if len(devices) % fixed:
            raise UserError(f"config.mesh is {written}; {len(devices)} devices do not divide by {fixed}")
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise UserError(f"config.mesh is {written}, {fixed} devices; there are {len(devices)} (one axis may be -1)")
    # Linen's logical constraints need Auto axes; jax.make_mesh would default to Explicit ones, where they fail. And it
    # lets an axis take part of a torus's axis on some TPUs only, without which most meshes cannot be laid out.
    types, groups = (AxisType.Auto,) * len(AXES), {_group(device) for device in devices}
    outer, left = dict.fromkeys(AXES, 1), len(groups)
    for axis in BATCH_AXES:
        outer[axis] = math.gcd(sizes[axis], left)
        left //= outer[axis]
    if left > 1:
        # Tensor and sequence axes send at every layer; over the slow network the step would do little else.
        raise UserError(
            f"config.mesh is {written} over {len(groups)} slices or nodes; "
            f"expected data x fsdp to divide by {len(groups)}"
        )
    inner = [sizes[axis] // outer[axis] for axis in AXES]
    try:
        if len(groups) == 1:
            arranged = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
        else:
            arranged = mesh_utils.create_hybrid_device_mesh(
                inner,
                tuple(outer.values()),
                devices,
                process_is_granule=not hasattr(devices[0], "slice_index"),
                allow_split_physical_axes=True,
            )
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"config.mesh is {written}, which cannot be laid out on these devices: {first_line(error)}"
        ) from None
    return Mesh(arranged, AXES, axis_types=types)


def _group(device: jax.Device) -> int:
    """Which fast network a device is on: its slice, or on GPUs that know of none its process's node."""
    if device.platform == "gpu":
        return getattr(device, "slice_index", device.process_index)
    return getattr(device, "slice_index", 0)


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Makes the mesh and the axis tables current, so that the models' logical constraints take hold.

    ``with mesh:`` would make them vanish without a word.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield


def batch_shards(mesh: Mesh) -> int:
    """In how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_size: int, micro_batches: int, mesh: Mesh) -> None:
    """Refuses a batch that would not split evenly.

    Raises:
      UserError: a micro-batch does not divide over the mesh's data and fsdp axes.
    """
    shards = batch_shards(mesh)
    rows = batch_size // micro_batches
    if rows % shards:
        split = f" in {micro_batches} micro-batches of {rows}" if micro_batches > 1 else ""
        lower, upper = (rows // shards) * shards * micro_batches, -(-rows // shards) * shards * micro_batches
        near = f"{lower} or {upper}" if lower else f"{upper}"
        raise UserError(
            f"config.batch_size {batch_size}{split} does not divide over {shards} devices "
            f"(mesh data x fsdp); nearest that does: {near}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp; whatever follows the first axis is whole on each device."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def one_per_device(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices: each holds one row, which its host may write."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_shardings(boxed: Any, mesh: Mesh, tolerance: float) -> tuple[Any, list[str]]:
    """Shardings of boxed abstract variables, and a line for each axis that had to stay whole.

    Args:
      boxed: Abstract variables with logical axis names, from ``jax.eval_shape`` of ``Objective.init``.
      mesh: The mesh.
      tolerance: Share of all parameters that may stay whole on an axis because a dimension does not divide by it.

    Returns:
      A tree like the unboxed variables of ``NamedSharding``, and notes on dimensions that the mesh does not divide.

    Raises:
      UserError: more than that would stay whole, and every device would hold it.
    """
    notes: list[str] = []
    whole: dict[str, int] = {}  # mesh axis -> parameters
    total = sum(math.prod(unbox(leaf).shape) for leaf in jax.tree.leaves(boxed, is_leaf=is_box))

    def place(path: Any, leaf: Any) -> NamedSharding:
        shape = unbox(leaf).shape
        names = getattr(leaf, "names", None) or (None,) * len(shape)
        spec = []
        for size, name in zip(shape, names, strict=True):
            if name is not None and name not in PARAMETER_AXES:
                raise ValueError(f"parameter axis {name!r} of {jax.tree_util.keystr(path)} is not in PARAMETER_AXES")
            axis = PARAMETER_AXES.get(name)
            if axis is not None and size % mesh.shape[axis]:
                notes.append(f"{parameter_name(path)}: {name}={size} is not split {mesh.shape[axis]} ways over {axis}")
                whole[axis] = whole.get(axis, 0) + math.prod(shape)
                axis = None
            spec.append(axis)
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = jax.tree_util.tree_map_with_path(place, boxed, is_leaf=is_box)
    for axis, parameters in whole.items():
        if parameters > tolerance * total:
            raise UserError(
                f"config.mesh.{axis}={mesh.shape[axis]} would leave {parameters / total:.0%} of the parameters whole on"
                f" each device ({notes[0]}{', ...' if len(notes) > 1 else ''}); expected a size that divides them, or "
                f"config.mesh.tolerance above {tolerance:g}"
            )
    return shardings, notes


def undivided(jaxpr: Any, mesh: Mesh, named: Mapping[int, str] | None = None) -> list[str]:
    """A line for each size of activations that a constraint does not split evenly; XLA pads it, and devices idle.

    Args:
      jaxpr: A traced step, ``jax.stages.Traced.jaxpr``.
      mesh: The mesh that its constraints name.
      named: What in the config is split over tensor, by its size: ``{12: "config.model.heads"}``.
    """
    found: dict[tuple[str, int], str] = {}

    def walk(jaxpr: Any) -> None:
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # closed ones hold the open one
        for equation in jaxpr.eqns:
            if equation.primitive.name == "sharding_constraint":
                look(equation.invars[0].aval.shape, equation.params["sharding"].spec)
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
                if is_jaxpr(value):
                    walk(value)

    def look(shape: tuple[int, ...], spec: PartitionSpec) -> None:
        for size, axes in zip(shape, spec, strict=False):
            axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
            ways = math.prod(mesh.shape[axis] for axis in axes)
            if size % ways:
                over = " x ".join(axis for axis in axes if mesh.shape[axis] > 1)
                name = (named or {}).get(size, "") if over == "tensor" else ""
                line = f"{name}{'=' if name else ''}{size} is not split evenly {ways} ways over {over}"
                found.setdefault((over, size), f"{line} (activations {shape})")

    def is_jaxpr(value: Any) -> bool:
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    walk(jaxpr)
    return list(found.values())


def is_box(leaf: Any) -> bool:
    """Whether a leaf of boxed variables carries axis names."""
    return isinstance(leaf, nn.meta.AxisMetadata)


def unbox(tree: Any) -> Any:
    """Drops the axis names. Flax's own ``unbox`` would also add a constraint to every array, traced or not."""
    return jax.tree.map(lambda leaf: leaf.value if is_box(leaf) else leaf, tree, is_leaf=is_box)


def parameter_name(path: Any) -> str:
    """``encoder/layers/mlp/up/kernel`` from a key path."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
