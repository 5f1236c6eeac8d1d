"""Times from counts, against arithmetic by hand."""

import dataclasses
import itertools

import pytest

from sslx.planning.roofline import Roofline, estimate, ici_bandwidth
from sslx.planning.topology import Topology
from sslx.planning.traffic import Collective
from sslx.train.chips import Chip, Network


@dataclasses.dataclass(frozen=True)
class Place:
    coords: tuple[int, ...]


def slice_of(*shape):
    devices = tuple(Place(at) for at in itertools.product(*map(range, shape)))
    chip = Chip(flops=100.0, hbm_bytes=1000, hbm_bandwidth=10.0, network=Network(len(shape), 2.0, 0.5))
    return Topology("made up", devices, chip, shape, 1)


def all_reduce(members, size=64, times=1, slices=1, group=None):
    return Collective("all-reduce", "a", size, times, group or len(members), slices, tuple(members))


def test_a_step_is_as_slow_as_its_slowest_resource_or_their_sum():
    where = slice_of(16, 16)
    row = range(16)  # the chips along the second axis: a ring
    sent = [all_reduce(row, size=64, times=3), Collective("all-reduce", "send", 10, 1, 2, 2)]
    times = estimate(
        where, where.devices, model_flops=256 * 100.0, executed_flops=256 * 150.0, hbm_bytes=30.0, collectives=sent
    )
    assert times.compute == 1.5
    assert times.hbm == 3.0
    assert times.ici == pytest.approx(3 * 2 * 64 * 15 / 16 / (2 * 2.0))  # 90: two links of 2 B/s
    assert times.dcn == 2 * 10 / 2 / 0.5
    assert times.bound == "ici"
    assert times.overlapped == times.ici
    assert times.serial == pytest.approx(1.5 + 3.0 + 90.0 + 20.0)
    assert times.mfu == pytest.approx(1 / 90)
    assert times.serial_mfu == pytest.approx(1 / 114.5)


def test_a_step_bound_by_products_alone_has_the_utilisation_of_its_recomputation():
    times = Roofline(compute=4.0, hbm=1.0, ici=0.5, dcn=0.0, model=3.0)
    assert (times.bound, times.mfu, times.serial_mfu) == ("compute", 0.75, 3 / 5.5)


@pytest.mark.parametrize(
    ("shape", "members", "links"),
    [
        ((16, 16), range(256), 4),  # both axes, rings
        ((16, 16), range(16), 2),  # one axis, a ring
        ((16, 16), range(4), 1),  # part of an axis: a line
        ((16, 16), range(0, 256, 16), 2),
        ((16, 16), range(0, 16, 4), 0.5),  # a ring of every fourth chip, beside three others
        ((16, 16), range(0, 8, 2), 0.5),  # a line of every second chip
        ((4, 8), range(32), 2),  # lines along both
        ((4, 4, 4), range(64), 6),
        ((2, 2, 1), range(4), 2),
        ((16, 16), (), 4),  # all chips
    ],
)
def test_links_follow_the_axes_that_a_group_spans(shape, members, links):
    where = slice_of(*shape)
    assert ici_bandwidth(where, where.devices, all_reduce(members, group=max(2, len(members)))) == links * 2.0


def test_a_permute_uses_one_link():
    where = slice_of(16, 16)
    assert ici_bandwidth(where, where.devices, Collective("collective-permute", "p", 8, 1, 2, 1, (0, 1))) == 2.0
