"""Checkpoints of a run: every call to Orbax in the tree is here.

A checkpoint ``checkpoints/<step>/`` holds the ``TrainState`` and what else resuming needs (``progress``: best metric,
patience, ...). Writing is asynchronous and atomic: a folder with a step's bare number is complete.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils.epath import Path
from orbax.checkpoint import checkpoint_managers

from sslx.config import build
from sslx.errors import UserError, first_line
from sslx.settings import CheckpointConfig
from sslx.storage import absolute
from sslx.train.hosts import agree, progress, together
from sslx.train.step import TrainState

DISK_ERRORS = (
    "No space left on device",
    "Disk quota exceeded",
    "Read-only file system",
    "Permission denied",
    "File too large",
)

SMALLEST_SLICE = 1 << 20  # bytes


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path, config: CheckpointConfig):
        self._folder = absolute(run) / "checkpoints"
        self._config = config
        self._manager: ocp.CheckpointManager | None = None

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return saved_steps(self._folder)

    def best_step(self) -> int | None:
        """The kept checkpoint that is best by ``config.best_metric``, or None."""
        return self._open().best_step()

    def save(self, state: TrainState, step: int, kept: dict, metrics: dict[str, float] | None) -> None:
        """Starts writing; returns as soon as the arrays are copied off the devices.

        Args:
          state: The training state; may be donated right after.
          step: Its step, as a host integer.
          kept: What else resuming needs; JSON.
          metrics: Evaluation metrics of this step, or None if it was not evaluated.

        Raises:
          UserError: the disk is full or not writable (of this save or of the one before it).
        """
        with self._writing():
            kept = {**kept, "digest": _digest_of(state)}
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(kept))
            self._open().save(step, args=args, metrics=metrics, force=True)

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          UserError: the disk is full or not writable.
        """
        if self._manager is not None:
            with self._writing():
                self._manager.wait_until_finished()

    def restore(
        self, abstract: TrainState, step: int | None = None, say: Callable[[str], None] = print
    ) -> tuple[TrainState, dict] | None:
        """Reads the newest checkpoint, or ``step``'s, sharded like ``abstract``.

        A damaged checkpoint is passed over for the one before it and, once that one has been read, renamed to
        ``<step>.damaged``, since the run will come to that step again. Where none can be read nothing is renamed: then
        the cause is more likely the disk, the memory or another version than damage.

        Args:
          abstract: ``ShapeDtypeStruct`` with shardings, in the shape of the state.
          step: A certain step; None: the newest that can be read.
          say: Where to tell of a damaged checkpoint.

        Returns:
          The state and the progress saved with it, or None if there is no checkpoint.

        Raises:
          UserError: there are checkpoints and none can be read.
        """
        # What host 0 sees: a network file system may show the others an older listing.
        candidates = [step] if step is not None else agree("the list of checkpoints", self.steps())[0][::-1]
        damaged: dict[int, str] = {}
        for candidate in candidates:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore())
            progress("restoring a checkpoint", candidate)
            state, kept, reason = None, {}, ""
            try:
                with _reader(ocp.CompositeCheckpointHandler()) as reader:
                    restored = reader.restore(self._folder / str(candidate), args=args)
                state, kept = restored["state"], restored["progress"]
            except Exception as error:
                # Orbax, TensorStore and JSON each raise their own kinds on damaged files.
                reason = first_line(error)
            # Each host reads its own part: all pass over what one of them cannot read.
            reason = next(filter(None, agree("reading a checkpoint", reason)), "")
            if not reason and _digest_of(state) != kept.pop("digest", None):
                reason = "its arrays are not those that were saved"
            if reason:
                damaged[candidate] = reason
                say(f"checkpoint {candidate} cannot be read ({damaged[candidate]}); trying the one before it")
                continue
            if damaged:
                self.close()  # it would go on counting what is put aside
                with together("putting damaged checkpoints aside"):
                    for broken in damaged if jax.process_index() == 0 else ():
                        _move_aside(self._folder / str(broken))
            return state, kept
        if damaged:
            listing = "; ".join(f"{broken} ({reason})" for broken, reason in damaged.items())
            raise UserError(f"no checkpoint in {self._folder} can be read: {listing}")
        return None

    def close(self) -> None:
        """Waits for writes and releases the manager."""
        if self._manager is not None:
            with self._writing():
                self._manager.close()
            self._manager = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            config, policies = self._config, checkpoint_managers
            keep = [policies.LatestN(config.keep)]
            if config.keep_best:
                keep.append(
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics[config.best_metric],
                        reverse=config.best_mode == "min",
                        n=config.keep_best,
                        keep_checkpoints_without_metrics=False,
                    )
                )
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                best_fn=lambda metrics: metrics[config.best_metric],
                best_mode=config.best_mode,
                cleanup_tmp_directories=True,
            )
            _write_small_arrays_from_one_replica()
            with self._writing():
                self._manager = ocp.CheckpointManager(self._folder, options=options)
        return self._manager

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        def kept() -> str:
            for partial in self._folder.glob("*.orbax-checkpoint-tmp*"):
                partial.rmtree(missing_ok=True)
            return f"; step {self.steps()[-1]} is safe" if self.steps() else "; no earlier checkpoint"

        with _explained(f"cannot write a checkpoint in {self._folder}", kept):
            yield


@contextlib.contextmanager
def _explained(what: str, kept: Callable[[], str] = str) -> Iterator[None]:
    """Turns what a disk says that is full or not writable into one line, which ``kept()`` ends."""
    try:
        yield
    except Exception as error:
        # TensorStore raises ValueError with the system's words somewhere in a long message.
        reason = next((words for words in DISK_ERRORS if words in str(error)), None)
        if reason is None and not isinstance(error, OSError):
            raise
        raise UserError(f"{what}: {reason or first_line(error)}{kept()}") from None


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a ``checkpoints`` folder, oldest first; [] if there is none."""
    if not Path(folder).is_dir():
        return []
    return sorted(int(path.name) for path in Path(folder).iterdir() if path.is_dir() and path.name.isdecimal())


def chosen_step(run: Path, written: Mapping[str, Any], step: int | None) -> int:
    """The checkpoint of a run, whose config is ``written``, that is read when ``step`` is asked for.

    None asks for the best of a downstream task's run, the newest of any other.

    Raises:
      UserError: the run has no checkpoint, or none of this step.
    """
    steps = saved_steps(absolute(run) / "checkpoints")
    if not steps:
        raise UserError(f"no checkpoint in {run}/checkpoints; expected checkpoints/<step>/ of a run that has saved")
    if step is not None:
        if step not in steps:
            raise UserError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        return step
    best = None
    if "task" in written:
        best = best_saved_step(run, build(CheckpointConfig, written["checkpoint"], "config.checkpoint"))
    return steps[-1] if best is None else best


def best_saved_step(run: Path, config: CheckpointConfig) -> int | None:
    """The kept checkpoint of a run that is best by ``config.best_metric``, or None; the folder is only read."""
    folder = absolute(run) / "checkpoints"
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics[config.best_metric], best_mode=config.best_mode, read_only=True
    )
    with ocp.CheckpointManager(folder, options=options) as manager:
        return manager.best_step()


def read_variables(run: Path, step: int | None = None) -> dict[str, Any]:
    """Reads ``{"params", "state"}`` of a run as NumPy arrays, without the optimizer's moments.

    Args:
      run: The run folder.
      step: Which checkpoint; None: the newest.

    Raises:
      UserError: the run has no checkpoint, or it cannot be read.
    """
    folder = absolute(run) / "checkpoints"
    steps = saved_steps(folder)
    if not steps:
        raise UserError(f"no checkpoint in {folder}; expected checkpoints/<step>/ of a run that has saved")
    path = folder / str(steps[-1] if step is None else step) / "state"
    try:
        with _quietly(), _reader(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.metadata(path).item_metadata.tree
            wanted = {"params": tree["params"], "state": tree.get("state") or {}}
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            item = jax.tree.map(lambda _: 0, wanted)
            return reader.restore(path, args=ocp.args.PyTreeRestore(item, restore_args=as_numpy, partial_restore=True))
    except Exception as error:
        raise UserError(f"checkpoint {path.parent} cannot be read: {first_line(error)}") from None


def write_arrays(folder: Path, tree: dict[str, Any]) -> None:
    """Writes a tree of arrays, in place of what the folder holds; each host writes its parts.

    Raises:
      UserError: the disk is full or not writable.
    """
    _write_small_arrays_from_one_replica()
    with _explained(f"cannot write {folder}"), ocp.StandardCheckpointer() as writer:
        writer.save(folder, tree, force=True)


def read_arrays(folder: Path) -> dict[str, Any]:
    """Reads what `write_arrays` has written, as NumPy arrays.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with _quietly(), _reader(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.metadata(folder).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            item = jax.tree.map(lambda _: 0, tree)
            return reader.restore(folder, args=ocp.args.PyTreeRestore(item, restore_args=as_numpy))
    except Exception as error:
        raise UserError(f"{folder} cannot be read: {first_line(error)}") from None


@functools.cache
def _write_small_arrays_from_one_replica() -> None:
    """Arrays of which each device has a copy are written by all of them, a slice each, only where slices are large.

    Orbax compiles a program for each such slice: of the state of a tiny BERT on eight devices hundreds, and its first
    save took seconds.
    """
    handlers = ocp.type_handlers
    usual = handlers.get_type_handler(jax.Array)
    if type(usual) is not handlers.ArrayHandler:  # someone's own, such as Pathways'
        return
    # What the handler that it replaces writes beside the arrays; Orbax offers no other way to it.
    described = getattr(usual, "_array_metadata_store", None)
    handler = handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SMALLEST_SLICE, array_metadata_store=described)
    with _quietly():
        handlers.register_type_handler(jax.Array, handler, override=True)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Orbax's warnings of what is meant: a handler that is replaced, a file that its own checkpointer of whole
    steps would have written."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _reader(handler: ocp.CheckpointHandler) -> ocp.Checkpointer:
    """Reads for this host alone.

    Orbax otherwise ends each reading with a meeting of all hosts, where the others would wait for one that fails.
    """
    here = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _digest_of(state: TrainState) -> list[int]:
    """The wrapping sum of each array's bits, as uint32.

    The files carry no checksum of the values, and a flipped bit would otherwise be trained on. Integer sums do not
    depend on the order of addition, so the digest is the same on any mesh.
    """
    return np.asarray(_digest(state.step.sharding)(state)).tolist()


@functools.cache
def _digest(everywhere: jax.sharding.Sharding) -> Callable[[TrainState], jax.Array]:
    def bits(array: jax.Array) -> jax.Array:
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
        return jnp.sum(jax.lax.bitcast_convert_type(array, width), dtype=jnp.uint32)

    # Whole on every device, like the step's sharding that is passed, so that each host can read it.
    return jax.jit(lambda state: jnp.stack([bits(leaf) for leaf in jax.tree.leaves(state)]), out_shardings=everywhere)


def _move_aside(path: Path) -> None:
    target = path.with_name(f"{path.name}.damaged")
    target.rmtree(missing_ok=True)
    path.rename(target)
