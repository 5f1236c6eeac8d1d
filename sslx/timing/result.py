"""What a timing of a config found, as it is printed, written and compared."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sslx.config import differences
from sslx.errors import UserError
from sslx.timing.clock import Spread
from sslx.timing.compilation import Compilation
from sslx.timing.trace import Operation

# Keys of a config that say where its data lie and what becomes of a run, and nothing about a step.
ASIDE = (
    "data.cache_dir",
    "data.tfds_dir",
    "hosts",
    "checkpoint",
    "eval",
    "diagnostics",
    "alarms",
    "log",
    "steps",
    "init",
)


@dataclasses.dataclass(frozen=True)
class Result:
    """Everything that was measured. Times are seconds, rates are per second and of all devices together.

    Attributes:
      config: The resolved config.
      device: Kind of the devices, such as ``NVIDIA H200``.
      devices: How many.
      versions: Of what decides about speed.
      batch: Shapes of one batch.
      step: From one step to the next.
      input, host, waiting: Its parts: the host waits for a batch, works, waits for the devices.
      alone: A step by itself, from handing it over until its results are there.
      row_unit: What a row is: ``images``, ``rows``.
      useful, positions: Tokens of a batch, and places of a batch for tokens; None where rows have none.
      model_flops: FLOPs of one step, as `Objective.flops` counts them.
      precision: Dtype of the model's products.
      product_size: Height of the square matrices of `product`.
      product: FLOP/s of a matrix product.
      peak: FLOP/s that are published of the devices at bf16; None where nothing is.
      memory: Bytes, at most; and what was counted.
    """

    config: dict[str, Any]
    device: str
    devices: int
    versions: dict[str, str]
    batch: dict[str, list[int]]
    step: Spread
    input: Spread
    host: Spread
    waiting: Spread
    alone: Spread
    row_unit: str
    useful: float | None
    positions: int | None
    model_flops: float
    precision: str
    product_size: int
    product: Spread
    peak: float | None
    compilation: Compilation
    memory: int
    memory_of: str
    notes: tuple[str, ...] = ()
    operations: tuple[Operation, ...] = ()

    @property
    def rows(self) -> int:
        """Of a batch."""
        return next(iter(self.batch.values()))[0]

    @property
    def rates(self) -> dict[str, float]:
        """What a second brings at the median step: rows, and of text the tokens, and these with the padding."""
        per_second = {f"{self.row_unit}_per_second": self.rows / self.step.median}
        if self.useful is not None:
            per_second["tokens_per_second"] = self.useful / self.step.median
        if self.positions is not None:
            per_second["padded_tokens_per_second"] = self.positions / self.step.median
        return per_second

    @property
    def flops(self) -> float:
        """Model FLOP/s at the median step."""
        return self.model_flops / self.step.median

    @property
    def shares(self) -> dict[str, float | None]:
        """Model FLOP/s as a share of the published peak and of the measured product."""
        peak = self.flops / self.peak if self.peak else None
        return {"of_peak": peak, "of_product": self.flops / self.product.median}

    def json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return dataclasses.asdict(self) | {"rates": self.rates, "model_flops_per_second": self.flops} | self.shares


def peak_memory() -> tuple[int, str]:
    """Bytes of memory in use at most, on the fullest local device if the devices count them, and what was counted."""
    counted = [stats["peak_bytes_in_use"] for device in jax.local_devices() if (stats := device.memory_stats())]
    if counted:
        return max(counted), "on the fullest device"
    # Linux counts in KiB, macOS in bytes.
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale, "resident in the process, compiling included"


def read(file: Path) -> dict[str, Any]:
    """A result as it was written.

    Raises:
      UserError: there is none in the file.
    """
    try:
        values = json.loads(file.read_text(encoding="utf8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError:
        raise UserError(f"{file} is no JSON; expected a file that --json has written") from None
    if not isinstance(values, dict) or not {"step", "batch", "device", "config"} <= values.keys():
        raise UserError(f"{file} is no result of sslx.bench; expected a file that --json has written")
    return values


def comparable(config: Mapping[str, Any], batch: Mapping[str, Any], there: Mapping[str, Any], file: Path) -> list[str]:
    """What the configs of two results differ in, a line for each key.

    Raises:
      UserError: they have other objectives, batches or devices, between which a ratio means nothing.
    """
    part = "pretext" if "pretext" in config else "task"
    here = {
        "objective": config[part]["name"],
        "batch": {name: list(shape) for name, shape in batch.items()},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    other = {
        "objective": there["config"].get(part, {}).get("name"),
        "batch": there["batch"],
        "devices": f"{there['devices']} x {there['device']}",
    }
    for name, value in here.items():
        if value != other[name]:
            raise UserError(
                f"cannot compare with {file}: its {name} is {_short(other[name])}, here it is {_short(value)}"
            )
    found = differences(there["config"], json.loads(json.dumps(config)))
    kept = {key: pair for key, pair in found.items() if not f"{key}.".startswith(tuple(f"{name}." for name in ASIDE))}
    return [f"config.{key}: {old!r} there, {new!r} here" for key, (old, new) in kept.items()]


def _short(value: Any) -> str:
    if not isinstance(value, Mapping):
        return repr(value)
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in value.items())
