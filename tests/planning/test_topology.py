"""Names of TPU slices; what the compiler describes behind them."""

import pytest

from sslx.errors import UserError
from sslx.planning import topology
from sslx.train.chips import CHIPS, Chip, chip_of, peak_flops


class Device:
    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5e:16x16", ("v5e", "16x16")),
        ("v5e-256", ("v5e", "16x16")),
        ("v5litepod-256", ("v5e", "16x16")),
        ("v6e-8", ("v6e", "2x4")),
        ("v5p-128", ("v5p", "4x4x4")),  # TensorCores: 64 chips
        ("v5p-1024", ("v5p", "8x8x8")),
        ("v5p:4x4x12", ("v5p", "4x4x12")),
        (" V5E-4 ", ("v5e", "2x2")),
    ],
)
def test_names_are_read(name, expected):
    assert topology.read_name(name) == expected


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e:16x15", "did you mean 'v5e:16x16'?"),
        ("v5e-255", "did you mean 'v5e-256'?"),
        ("v5x:16x16", "did you mean 'v5e:16x16'?"),
        ("v5e-5", "did you mean 'v5e-4'? (valid: v5e-1, v5e-4, v5e-8, v5e-16, v5e-32, v5e-64, v5e-128, v5e-256)"),
        ("v5e-7", "did you mean 'v5e-8'?"),
        ("v5e-1000", "did you mean 'v5e-256'?"),
        ("v5litepod-100", "did you mean 'v5e-128'?"),
        ("v5p-100", "did you mean 'v5p-128'?"),
        ("v6e:3x3", "did you mean 'v6e:2x4'?"),
        ("v5e:9", "did you mean 'v5e:2x4'?"),
        ("v5e:big", "'v5e:big'; valid: v5e:1x1, "),
        ("v5e", "'v5e'; valid: v5e-1, "),
        ("v5p:4x4x5", "did you mean 'v5p:4x4x4'?"),
        ("v5p:0x4x4", "unknown topology 'v5p:0x4x4'"),
        ("v5p:16x16x28", "unknown topology"),
        ("v4:2x2x1", "unknown topology 'v4:2x2x1'"),
        ("", "unknown topology ''"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, said):
    with pytest.raises(UserError) as error:
        topology.read_name(name)
    assert said in str(error.value)


def test_every_short_name_counts_what_cloud_counts():
    for name, (generation, shape) in topology.names().items():
        per_chip = 2 if generation == "v5p" else 1
        assert int(name.split("-")[1]) == topology.chips(shape) * per_chip
    assert topology.names()["v5e-256"] == ("v5e", "16x16")


def test_rings_close_where_the_hardware_closes_them():
    def wraps(*shape):
        one = topology.Topology("", (), None, shape, 1)
        return [one.wraps(axis) for axis in range(len(shape))]

    assert wraps(16, 16) == [True, True]
    assert wraps(8, 16) == [False, True]
    assert wraps(4, 4, 8) == [True, True, True]
    assert wraps(2, 4, 4) == [False, False, False]


def test_the_compiler_describes_slices_that_are_not_here():
    found = topology.tpu("v5p-16", slices=2)
    assert found.name == "2 x v5p:2x2x2 (16 chips)"
    assert found.note == "v5p-16 counts TensorCores, 2 to a chip: 8 chips, 2x2x2"
    assert len(found.devices) == 16
    assert {device.slice_index for device in found.devices} == {0, 1}
    assert found.chip is CHIPS["TPU v5"]
    assert topology.tpu("v6e-1").chip is CHIPS["TPU v6 lite"]
    assert topology.tpu("v5e-8").chip is CHIPS["TPU v5 lite"]


def test_a_missing_compiler_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtpu", None)
    with pytest.raises(UserError, match=r"pip install 'sslx\[plan\]'"):
        topology.tpu("v5e-4")


def test_simulated_devices_are_those_of_this_process():
    assert len(topology.simulated(4).devices) == 4
    assert topology.simulated(8).chip is None
    with pytest.raises(UserError, match="has 8 CPU devices"):
        topology.simulated(9)


def test_chips_are_found_by_the_words_of_their_kind():
    assert peak_flops(Device("TPU v5 lite")) == 197e12
    assert peak_flops(Device("TPU v5")) == 459e12
    assert peak_flops(Device("TPU v6 lite")) == 918e12
    assert peak_flops(Device("NVIDIA H100 80GB HBM3")) == 989e12
    assert peak_flops(Device("NVIDIA L40")) is None
    assert chip_of(Device("cpu")) is None


def test_every_chip_says_where_its_numbers_come_from_and_those_planned_for_are_complete():
    assert all(chip.source for chip in CHIPS.values())
    for name in ("TPU v5 lite", "TPU v5", "TPU v6 lite"):
        chip: Chip = CHIPS[name]
        assert chip.hbm_bytes
        assert chip.hbm_bandwidth
        assert chip.network
    network = CHIPS["TPU v5 lite"].network
    assert network.link_bandwidth * 2 * 2 * 2 == 400e9  # two links along two axes, both directions
    assert network.dcn_bandwidth == 3.125e9
