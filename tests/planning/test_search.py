"""Searches: meshes are ranked by what a compiled step sends, and one that does not fit is made to."""

import dataclasses
import io
import math
import types

import ml_collections
import pytest
from rich.console import Console

from sslx import plan as entry_plan
from sslx.errors import UserError
from sslx.planning import report, search, topology
from sslx.planning.compilation import plan


def estimated(written, where, found):
    """Estimated bytes that a chip sends inside its slice and to others, for the mesh and micro-batches of a plan."""
    return search.sent(search.describe(written, where), where, found.mesh, found.settings["micro_batches"])


def test_every_micro_batch_sends_what_data_sends_and_the_estimate_knows_it(small):
    where, sent = topology.simulated(4), {}
    for parts in (1, 4):
        written = small({"micro_batches": parts})
        found = plan(written, where, evaluation=False)
        sent[parts] = found.ici_bytes
        assert found.ici_bytes == pytest.approx(estimated(written, where, found)[0], rel=0.02)
    assert sent[4] == pytest.approx(4 * sent[1], rel=0.02)


@pytest.fixture(scope="module")
def split_alike(small):
    """Configs and plans of one step on 8 chips of v5e, all on one axis, in bfloat16: by the axis."""
    written = {
        axis: small({"mesh.data": 1, f"mesh.{axis}": 8, "model.dtype": "bfloat16", "batch_size": 64})
        for axis in ("data", "fsdp")
    }
    where = topology.tpu("v5e-8")
    return {axis: (config, plan(config, where, evaluation=False)) for axis, config in written.items()}


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_the_estimate_of_an_axis_is_what_compiles_within_a_factor(split_alike, axis):
    written, found = split_alike[axis]
    ici, dcn = estimated(written, topology.tpu("v5e-8"), found)
    assert 1 / 2.5 <= ici / found.ici_bytes <= 2.5
    assert dcn == found.dcn_bytes == 0


def test_splitting_parameters_sends_more_than_repeating_them_and_ranks_behind(split_alike):
    where = topology.tpu("v5e-8")
    assert split_alike["data"][1].ici_bytes < split_alike["fsdp"][1].ici_bytes
    costs = {
        axis: search.cost(search.describe(written, where), where, found.mesh, 1)
        for axis, (written, found) in split_alike.items()
    }
    assert costs["data"] < costs["fsdp"]
    assert costs["data"][1:] != costs["fsdp"][1:]  # not by the order in which meshes are listed


def test_slices_send_each_other_what_is_estimated_within_a_factor(small):
    where, written = topology.tpu("v5e-4", slices=2), small({"batch_size": 64})
    found = plan(written, where, evaluation=False)
    assert 1 / 2.5 <= estimated(written, where, found)[1] / found.dcn_bytes <= 2.5


def test_a_search_compiles_the_first_meshes_and_tells_how_to_run_the_best(small):
    said = []
    plans = search.search(small({"batch_size": 64}), topology.tpu("v5e-4"), compile_at_most=2, say=said.append)
    assert len(plans) == 2
    assert [line.partition(":")[0] for line in said[::2]] == ["candidate 1 of 2", "candidate 2 of 2"]
    for told, line in zip(said[::2], said[1::2], strict=True):
        assert line.startswith(told.partition(": ")[2])  # the mesh that was announced
    assert all(found.fits for found in plans)
    assert plans[0].mesh != plans[1].mesh
    assert plans[0].roofline.overlapped <= plans[1].roofline.overlapped
    console = Console(file=io.StringIO(), width=160)
    report.ranking(plans, console)
    printed = console.file.getvalue()
    mesh = plans[0].mesh
    assert f"best: --config.mesh.data={mesh['data']}" in printed
    assert "--config.micro_batches=1 --config.model.remat=none" in printed
    for found in plans:
        assert f"{found.roofline.mfu:.1%}" in printed


def test_a_search_splits_a_batch_that_does_not_fit_until_it_does(small, monkeypatch):
    """Real compilations; what a step needs is made up, since one that needs 20 GiB takes minutes to compile."""

    def needy(written, where):
        found = plan(written, where, evaluation=False)
        if written["micro_batches"] >= 4:
            return found
        return dataclasses.replace(found, fits=False, needed=20 * 2**30, model_flops=1e15)

    monkeypatch.setattr(search, "plan", needy)
    said = []
    (found,) = search.search(
        small({"batch_size": 64, "model.layers": 1}), topology.tpu("v5e-4"), compile_at_most=1, say=said.append
    )
    assert said.pop(0).startswith("candidate 1 of 1: ")
    refusals = ["remat=none: does not fit, needs 20.0 of 16.0 GiB" in told for told in said]
    assert refusals == [True, True, False]
    assert "a step, all overlapped" in said[-1]
    assert found.fits
    assert (found.settings["batch_size"], found.settings["micro_batches"]) == (64, 4)


def test_what_a_search_could_not_make_fit_is_advised_from_where_it_ended(small, monkeypatch, capsys):
    """With 16 micro-batches, of one row each, only rematerialised layers are left to advise."""
    asked = small({"batch_size": 64, "model.layers": 1})
    first = plan(asked, topology.tpu("v5e-4"), evaluation=False)

    def never(written, where):
        settings = {"batch_size": 64, "micro_batches": written["micro_batches"], "remat": written["model"]["remat"]}
        needed = {"fits": False, "needed": 20 * 2**30, "memory": None, "model_flops": 1e15}
        return dataclasses.replace(first, settings=settings, **needed)

    class Given(types.SimpleNamespace):
        def __getitem__(self, name):
            return types.SimpleNamespace(present=True)

    given = Given(topology="v5e-4", slices=1, devices=None, search=True, compile_at_most=1, json="")
    monkeypatch.setattr(search, "plan", never)
    monkeypatch.setattr(entry_plan.flags, "FLAGS", given)
    monkeypatch.setattr(entry_plan, "end_on_signals", lambda: None)  # whose handlers would stay in the tests' process
    (found,) = entry_plan.main(ml_collections.ConfigDict(asked), None)
    assert (found.settings["micro_batches"], found.settings["remat"]) == (16, "none")
    told = capsys.readouterr().out
    advice = told.partition("what may make it fit, alone or together:\n")[2].partition("meshes by")[0]
    assert advice.split() == ["--config.model.remat=dots", "--config.model.remat=full"]


def test_micro_batches_are_the_first_remedy_where_arithmetic_hides_what_they_send(small):
    where, written = topology.tpu("v5e-4"), small({"batch_size": 64})
    found = plan(written, where, evaluation=False)
    refused = dataclasses.replace(found, fits=False, needed=20 * 2**30)
    slow, fast = (dataclasses.replace(refused, model_flops=flops) for flops in (1e15, 1.0))
    assert set(search.remedies(written, slow, where)[0]) == {"micro_batches"}
    assert set(search.remedies(written, fast, where)[0]) == {"model.remat"}


def test_remedies_that_cannot_suffice_say_so(small):
    where, written = topology.tpu("v5e-4"), small({"batch_size": 64, "mesh.data": 4})
    found = dataclasses.replace(plan(written, where, evaluation=False), fits=False, memory=None)
    gib = 2**30

    def told(needed, parameters, optimizer):
        console = Console(file=io.StringIO(), width=160)
        sizes = {"needed": needed * gib, "parameter_bytes": parameters * gib, "optimizer_bytes": optimizer * gib}
        report.show(dataclasses.replace(found, **sizes), where, written, console)
        return console.file.getvalue()

    alone = told(needed=20, parameters=2, optimizer=4)  # 8 with the gradients, of which fsdp=4 leaves 2
    assert "what may make it fit, alone or together" in alone
    assert "--config.mesh.fsdp=4" in alone
    assert "--config.micro_batches=" in alone
    assert "not enough alone" not in alone
    short = told(needed=40, parameters=2, optimizer=4)  # 34 are left
    assert "--config.mesh.fsdp=4 --config.mesh.data=1  state is 6.00 GiB a chip; not enough alone" in short
    assert "--config.model.remat=full\n" in short
    state = told(needed=30, parameters=5, optimizer=10)  # 20 with the gradients
    assert "--config.mesh.fsdp=4 --config.mesh.data=1  state is 15.00 GiB a chip\n" in state
    assert "--config.model.remat=full; not enough alone" in state
    assert "no setting makes it fit" in told(needed=120, parameters=25, optimizer=50)


def test_splits_are_all_and_only_those_of_the_devices():
    found = list(search.splits(12))
    assert len(found) == len(set(found))
    assert all(math.prod(split) == 12 for split in found)
    assert {(12, 1, 1), (1, 12, 1), (1, 1, 12), (2, 3, 2)} <= set(found)


def test_meshes_are_ranked_by_what_they_send(small):
    ranked = search.rank(small({"batch_size": 64}), topology.tpu("v5e-8"))
    assert {"data": 8, "fsdp": 1, "tensor": 1} in ranked
    assert all(math.prod(mesh.values()) == 8 and mesh["tensor"] <= 2 for mesh in ranked)  # two heads
    assert ranked[0]["tensor"] == 1
    with pytest.raises(UserError, match=r"batch_size 3 in 1 micro-batches divides over no mesh of 8 devices"):
        search.rank(small({"batch_size": 3}), topology.tpu("v5e-8"))


def test_a_search_needs_published_numbers(small):
    with pytest.raises(UserError, match="expected a --topology"):
        search.search(small(), topology.simulated(4))


def test_changes_reach_their_group_and_leave_the_original():
    written = {"steps": 1, "model": {"remat": "none", "width": 4}}
    assert search.changed(written, {"model.remat": "full", "micro_batches": 2}) == {
        "steps": 1,
        "model": {"remat": "full", "width": 4},
        "micro_batches": 2,
    }
    assert written["model"]["remat"] == "none"
