"""What every run has, whatever it learns: seed, steps, mesh, hosts, optimizer, checkpoints, evaluation, logs.

Each part is a frozen dataclass with its defaults, refused in one line where a value cannot be; `sslx.config` turns what
was written into them.
"""

from __future__ import annotations

import dataclasses
import functools

from sslx.errors import UserError, choose, nearest


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one axis may be -1 and takes what the others leave.

    Where devices are in groups (TPU slices, GPU nodes), the slow network between the groups is crossed by the first
    axes, in this order.
    """

    data: int = -1  # batch split, parameters replicated
    fsdp: int = 1  # batch split, parameters split too (ZeRO-3)
    sequence: int = 1  # positions of a row split; keys and values are gathered
    tensor: int = 1  # heads, MLP width and vocabulary split (Megatron)
    tolerance: float = 0.05  # share of the parameters that may stay whole because a dimension does not divide


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """How several processes find each other; one process by itself needs none of it."""

    cluster: str = "auto"  # auto | none | tpu | slurm | mpi: whose environment tells
    coordinator: str = ""  # HOST:PORT of host 0, in place of a cluster; with count and index
    count: int | None = None
    index: int | None = None
    join_seconds: float = 300.0  # for all hosts to come
    timeout_seconds: float = 600.0  # for a host to be heard from, and for a step to be made
    prepare_seconds: float = 3600.0  # for each phase that may take long: preparing, compiling, the last checkpoint, ...

    def __post_init__(self):
        choose(self.cluster, ("auto", "none", "tpu", "slurm", "mpi"), "config.hosts.cluster")
        for name, least in {"join_seconds": 1, "timeout_seconds": 1, "prepare_seconds": 1, "count": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"config.hosts.{name} is {value}; expected at least {least}")
        given = [name for name in ("coordinator", "count", "index") if getattr(self, name) not in ("", None)]
        if given and len(given) < 3:
            missing = next(name for name in ("coordinator", "count", "index") if name not in given)
            raise UserError(f"config.hosts.{given[0]} is given without config.hosts.{missing}; expected all three")
        if given and not 0 <= self.index < self.count:
            raise UserError(
                f"config.hosts.index is {self.index} of config.hosts.count={self.count}; expected 0 to {self.count - 1}"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, schedule, and which parameters they apply to. Patterns are regular expressions on ``a/b/c`` names."""

    name: str = "adamw"  # adamw | lamb | muon (matrices of the layers; AdamW for the rest) | sgd | lars
    learning_rate: float = 1e-3  # peak
    schedule: str = "linear"  # constant | linear | cosine | trapezoid, after the warm-up
    schedule_steps: int | None = None  # length of the schedule; None: the run's steps when it was first started
    warmup_steps: int = 100
    cooldown_share: float = 0.2  # trapezoid: share of the schedule that falls
    final_scale: float = 0.0  # last learning rate as a share of the peak
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    # float32 | bfloat16: what AdamW's and LAMB's moments are kept in, and those that Muon leaves to AdamW. Rounded at
    # random, the same way on any mesh; yet gradients that differ in their last bit may be rounded to other numbers.
    moments: str = "float32"
    momentum: float = 0.95  # Muon's, SGD's and LARS's
    trust: float = 0.001  # LARS's: a layer's rate as a share of its norm over its gradient's
    trust_clip: bool = False  # LARS: no layer's rate above the learning rate
    unadapted_scale: float = 1.0  # LARS: rate of biases and norms, which it does not adapt, as a share of the others'
    weight_decay: float = 0.01
    weight_decay_end: float | None = None  # to which it goes by half a cosine over the schedule; None: it stays
    no_decay: tuple[str, ...] = (r"(^|/)bias$", r"norm/scale$")
    clip_norm: float | None = 1.0
    freeze: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()  # what is trained at the peak rate throughout
    layer_decay: float = 1.0  # rate of layer l is layer_decay ** (depth - l); embeddings are layer 0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep. The last step, a signal and an early stop always save."""

    every_steps: int = 500
    every_minutes: float = 15.0
    keep: int = 2
    keep_best: int = 1
    best_metric: str = "eval/loss"
    best_mode: str = "min"  # min | max


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation, early stopping on ``checkpoint.best_metric``."""

    every_steps: int = 500
    batches: int | None = None  # None: all held-out rows
    patience: int | None = None  # evaluations without improvement before stopping; None: never
    min_delta: float = 0.0  # what counts as an improvement
    examples: int = 4  # rows shown as a table with the model's guesses


@dataclasses.dataclass(frozen=True)
class DiagnosticsConfig:
    """What is measured of the features of held-out rows in evaluations: spread, effective rank, uniformity."""

    rows: int = 512  # 0: nothing is
    every: int = 1  # evaluations
    views: int = 0  # random ones of each row, for alignment and LiDAR; each costs as much as the rows do

    def __post_init__(self):
        for name, least in {"rows": 0, "every": 1, "views": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"config.diagnostics.{name} is {getattr(self, name)}; expected at least {least}")
        if self.rows == 1:
            raise UserError("config.diagnostics.rows is 1; expected 0, or at least 2 to compare")
        if self.views == 1:
            raise UserError("config.diagnostics.views is 1; expected 0, or at least 2 to compare")


@dataclasses.dataclass(frozen=True)
class AlarmsConfig:
    """What of an evaluation after the warm-up is a sign that training goes wrong; see `sslx.train.alarms`."""

    evaluations: int = 3  # in succession with a sign, before its alarm is raised
    stop: bool = False  # an alarm ends the run
    chance_band: float = 0.02  # share of the chance value that a loss is away from it
    std_floor: float = 0.01  # of the features' spread
    std_share: float = 0.1  # of the most that the spread was
    rank_floor: float = 1.5  # of the features' effective rank
    directions_floor: float = 1.2  # of a count of directions: a few large ones make it small in good runs, too
    entropy_band: float = 0.02  # share of the most that an entropy can be

    def __post_init__(self):
        for name in (field.name for field in dataclasses.fields(self) if field.name != "stop"):
            least = 1 if name == "evaluations" else 0
            if getattr(self, name) < least:
                raise UserError(f"config.alarms.{name} is {getattr(self, name)}; expected at least {least}")


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
    """Probes of the features while a pretext task trains, of data that has labels; they change nothing about it."""

    probe: bool = False  # eval/online_linear and eval/online_knn
    learning_rate: float = 3e-3  # of the linear classifier, constant
    one_in: int = 4  # rows of a batch teaches the classifier: encoding them whole is what all of this costs
    train_rows: int = 4096  # whose features vote for the held-out rows nearest to them, in each evaluation
    eval_rows: int = 1024  # held-out rows that are voted for


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where training reports to; ``metrics.jsonl`` and TensorBoard are always written."""

    every_steps: int = 20
    wandb: str = ""  # Weights & Biases project; WANDB_MODE=offline works


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every run has, whatever it learns. ``data``, ``model`` and the objective have their own dataclasses."""

    seed: int = 0
    steps: int = 1000
    batch_size: int = 256  # rows in one update, over all devices
    micro_batches: int = 1  # the batch is split in this many for memory, with the same gradient
    on_nonfinite: str = "stop"  # stop | skip (the update is left out): a step whose loss or gradient is not finite
    skip_at_most: int = 5  # such steps in succession; with one more the run stops all the same
    init: str = ""  # what the encoder starts from: a run (its newest checkpoint), or a folder of published weights
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    online: OnlineConfig = OnlineConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self):
        for name, least in LEAST.items():
            value = functools.reduce(getattr, name.split("."), self)
            if value is not None and value < least:
                raise UserError(f"config.{name} is {value}; expected at least {least}")
        for name in ("beta1", "beta2", "momentum"):
            if not getattr(self.optimizer, name) < 1:
                raise UserError(f"config.optimizer.{name} is {getattr(self.optimizer, name)}; expected less than 1")
        for part in ("optimizer", "online"):
            if not getattr(self, part).learning_rate > 0:
                rate = getattr(self, part).learning_rate
                raise UserError(f"config.{part}.learning_rate is {rate}; expected more than 0")
        if self.batch_size % self.micro_batches:
            raise UserError(
                f"config.batch_size {self.batch_size} does not divide into config.micro_batches {self.micro_batches}"
            )
        for name, value, valid in (
            ("optimizer.schedule", self.optimizer.schedule, ("constant", "linear", "cosine", "trapezoid")),
            ("checkpoint.best_mode", self.checkpoint.best_mode, ("min", "max")),
            ("on_nonfinite", self.on_nonfinite, ("stop", "skip")),
        ):
            if value not in valid:
                raise UserError(f"unknown config.{name} {value!r}; {nearest(str(value), valid)}")


# The least value that makes sense; None is allowed where a key's type says so.
LEAST = {
    "seed": 0,
    "optimizer.beta1": 0,
    "optimizer.beta2": 0,
    "optimizer.momentum": 0,
    "optimizer.eps": 0,
    "optimizer.trust": 0,
    "optimizer.weight_decay_end": 0,
    "optimizer.clip_norm": 0,
    "optimizer.layer_decay": 0,
    "optimizer.final_scale": 0,
    "checkpoint.every_minutes": 0,
    "eval.min_delta": 0,
    "steps": 1,
    "batch_size": 1,
    "micro_batches": 1,
    "skip_at_most": 1,
    "optimizer.warmup_steps": 0,
    "optimizer.schedule_steps": 1,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 1,
    "checkpoint.keep_best": 0,
    "eval.every_steps": 1,
    "eval.batches": 1,
    "eval.patience": 1,
    "eval.examples": 0,
    "online.one_in": 1,
    "online.train_rows": 1,
    "online.eval_rows": 1,
    "log.every_steps": 1,
    "mesh.tolerance": 0,
}

# Keys a resumed run may change: they decide how long, where and how visibly it runs, not what it computes.
RESUMABLE = (
    "steps",
    "on_nonfinite",
    "skip_at_most",
    "mesh",
    "hosts",
    "checkpoint",
    "eval",
    "diagnostics",
    "alarms",
    "log",
    "data.cache_dir",
    "data.tfds_dir",
    "model.attention",
    "optimizer.schedule_steps",
)


def may_change(key: str) -> bool:
    """Whether a resumed run may change this dotted key."""
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in RESUMABLE)
