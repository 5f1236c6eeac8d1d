"""Plans of real steps: on simulated devices, and for TPU slices that are not here."""

import io
import json

import pytest
from rich.console import Console

from sslx.errors import UserError
from sslx.planning import report, search, topology
from sslx.planning.compilation import plan


@pytest.fixture(scope="module")
def replicated(small):
    """The plan of a step whose parameters are whole on each of four simulated devices."""
    return plan(small(), topology.simulated(4))


def test_parameters_whole_on_every_device_are_reduced_once(replicated):
    whole = 4 * replicated.parameters
    assert replicated.parameter_bytes == whole
    assert 2 * whole <= replicated.optimizer_bytes < 2.01 * whole  # Adam's two moments and its counters
    assert set(replicated.collectives) == {"all-reduce"}
    assert replicated.ici_bytes >= 2 * whole * 3 / 4
    assert replicated.dcn_bytes == 0
    assert replicated.mesh["data"] == 4
    assert replicated.fits
    assert replicated.hbm_bytes is None
    assert replicated.roofline is None
    assert replicated.memory.peak >= replicated.parameter_bytes + replicated.optimizer_bytes


def test_products_executed_are_those_of_the_model_and_more_when_layers_are_done_again(small, replicated):
    assert replicated.executed_flops == pytest.approx(replicated.model_flops, rel=0.02)
    again = plan(small({"model.remat": "full"}), topology.simulated(4), evaluation=False)
    assert again.model_flops == replicated.model_flops
    assert 1.2 < again.executed_flops / replicated.executed_flops < 1.4
    assert again.eval_memory is None
    assert replicated.eval_memory is not None


def test_a_plan_is_json(replicated):
    values = json.loads(json.dumps(replicated.json()))
    assert values["mesh"] == {"data": 4, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert values["collectives"]["all-reduce"]["ici_bytes"] == replicated.ici_bytes


def test_what_grows_with_devices_at_a_fixed_batch_a_device(small):
    """State a chip falls as 1/n; what a chip sends stays below a multiple of the parameters that n does not change."""
    plans = {}
    for devices in (1, 2, 4, 8):
        changes = {"mesh.data": 1, "mesh.fsdp": devices, "batch_size": 4 * devices, "model.layers": 1}
        plans[devices] = plan(small(changes), topology.simulated(devices), evaluation=False)
    whole = 4 * plans[1].parameters
    assert plans[1].ici_bytes == 0
    for devices, one in plans.items():
        # Norms and biases are not split: a small share.
        assert one.parameter_bytes <= whole / devices + 0.05 * whole
        assert one.optimizer_bytes <= 2.01 * (whole / devices + 0.05 * whole)
    shares = {n: plans[n].ici_bytes / (whole * (n - 1) / n) for n in (2, 4, 8)}
    assert max(shares.values()) <= 1.05 * min(shares.values())
    # Two gathers, and on CPU whole reductions of the gradients where a TPU scatters; small arrays are sent whole.
    assert max(shares.values()) <= 4


@pytest.mark.parametrize("shape", ["2x2x1", "2x2x4"])
def test_what_a_chip_of_a_pod_sends_stays_below_six_times_the_parameters(small, shape):
    """The README's bound, which a growth study of a larger model checks on up to 512 chips (plan_table.py)."""
    where = topology.tpu(f"v5p:{shape}")
    chips = len(where.devices)
    changes = {"mesh.data": 1, "mesh.fsdp": chips, "batch_size": 4 * chips, "model.dtype": "bfloat16"}
    found = plan(small(changes), where, evaluation=False)
    whole = 4 * found.parameters
    assert 0 < found.ici_bytes <= 6 * whole
    assert found.parameter_bytes + found.optimizer_bytes <= 3.03 * whole * (1 / chips + 0.05)


@pytest.fixture(scope="module")
def on_tpu(small):
    """A real compilation of a small step for 2 x 4 chips of v5e."""
    changes = {"mesh.data": 2, "mesh.fsdp": 4, "model.dtype": "bfloat16", "batch_size": 64, "model.layers": 3}
    return plan(small(changes), topology.tpu("v5e-8"))


def test_a_step_compiles_for_a_tpu_that_is_not_here(on_tpu):
    assert on_tpu.topology == "v5e:2x4 (8 chips)"
    assert on_tpu.fits
    assert on_tpu.hbm_bytes == 16 * 2**30
    assert on_tpu.needed == on_tpu.memory.peak < 2**28
    assert on_tpu.executed_flops == pytest.approx(on_tpu.model_flops, rel=0.02)
    assert on_tpu.compile_seconds > 0
    assert "all-gather" in on_tpu.collectives
    assert not any("unknown length" in note for note in on_tpu.notes)
    # Forward and backward, each layer gathers six kernels, whose loop body is written once.
    assert on_tpu.collectives["all-gather"].count >= 2 * 3 * 6
    times = on_tpu.roofline
    assert times.overlapped == max(times.compute, times.hbm, times.ici, times.dcn)
    assert 0 < times.serial_mfu < times.mfu < 1
    assert times.compute == pytest.approx(on_tpu.executed_flops / 8 / 197e12)


def test_slices_send_to_each_other_over_the_data_centre_network(small):
    where = topology.tpu("v5e-4", slices=2)
    found = plan(small({"batch_size": 64}), where, evaluation=False)
    assert found.mesh["data"] == 8
    whole = 4 * found.parameters
    # The compiler reduces the gradients inside each slice, then whole across: 2 (slices - 1) / slices of their bytes.
    assert 0.9 * whole <= found.dcn_bytes <= 1.1 * whole
    assert found.roofline.dcn > found.roofline.ici > 0


def test_a_step_that_does_not_fit_is_a_plan_with_remedies(small):
    huge = {"batch_size": 2**19, "data.seq_len": 512, "model.max_length": 512}
    written = small(huge)
    where = topology.tpu("v5e-4")
    found = plan(written, where)
    assert not found.fits
    assert found.memory is None
    assert found.roofline is None
    assert found.needed > found.hbm_bytes
    first, *others = search.remedies(written, found, where)
    assert first["micro_batches"] * found.hbm_bytes >= found.needed
    assert written["batch_size"] // 4 % first["micro_batches"] == 0
    assert {"model.remat": "full"} in others
    said = Console(file=io.StringIO(), width=160)
    report.show(found, where, written, said)
    report.ranking([found], said)
    said = said.file.getvalue()
    assert "does not fit: the training step needs" in said
    assert f"--config.micro_batches={first['micro_batches']}\n  --config.model.remat=dots\n" in said
    assert "none fits: take a larger topology" in said


def test_meshes_that_cannot_be_are_refused(small):
    with pytest.raises(UserError, match=r"3 devices; there are 4"):
        plan(small({"mesh.data": 3}), topology.simulated(4))
    with pytest.raises(UserError, match=r"does not divide over 8 devices"):
        plan(small({"batch_size": 12}), topology.simulated(8))
