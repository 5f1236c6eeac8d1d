"""`launch/gke_jobset.yaml` against the fields of JobSet and Kubernetes' own schema of a Job; its command run by bash.

`jobset_schema.json` is written from JobSet's documentation; the schema of a Job comes with kubernetes-validate.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "launch" / "gke_jobset.yaml").read_text()
SCHEMA = json.loads(Path(__file__).with_name("jobset_schema.json").read_text())
KUBERNETES = "1.31"


@pytest.fixture
def jobset() -> dict:
    return yaml.safe_load(TEXT)


def job_of(jobset: dict) -> dict:
    template = jobset["spec"]["replicatedJobs"][0]["template"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "sslx-slice-0"}, **template}


def pod_of(jobset: dict) -> dict:
    return job_of(jobset)["spec"]["template"]["spec"]


def check(jobset: dict) -> None:
    jsonschema.validate(jobset, SCHEMA)
    kubernetes_validate.validate(job_of(jobset), KUBERNETES, strict=True)


def test_it_has_the_fields_of_a_jobset_and_of_a_job(jobset):
    check(jobset)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (("spec",), "replicatedJob"),
        (("spec", "failurePolicy"), "maxRestart"),
        (("spec", "network"), "subDomain"),
        (("spec", "replicatedJobs", 0, "template", "spec"), "completionmode"),
        (("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy"), "rule"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"), "nodeSelectors"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0), "cmd"),
    ],
)
def test_the_schemas_refuse_a_field_that_does_not_exist(jobset, path, key):
    spoiled = copy.deepcopy(jobset)
    place = spoiled
    for step in path:
        place = place[step]
    place[key] = 1
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(spoiled)


def test_every_host_of_a_slice_is_one_pod_and_none_starts_without_the_others(jobset):
    job = job_of(jobset)["spec"]
    chips = pod_of(jobset)["containers"][0]["resources"]["limits"]["google.com/tpu"]
    x, y = map(int, pod_of(jobset)["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] == job["completions"] == x * y // chips
    assert job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0


def test_an_interruption_restarts_without_limit_a_mistake_fails_and_the_rest_is_counted(jobset):
    rules = job_of(jobset)["spec"]["podFailurePolicy"]["rules"]
    codes, disruption = rules[0]["onExitCodes"], rules[1]["onPodConditions"]
    assert (codes["operator"], codes["values"]) == ("In", [2, 75])
    assert codes["containerName"] == pod_of(jobset)["containers"][0]["name"]
    assert disruption == [{"type": "DisruptionTarget", "status": "True"}]
    assert {rule["action"] for rule in rules} == {"FailJob"}
    assert pod_of(jobset)["restartPolicy"] == "Never"  # or a pod failure policy is not allowed

    def action(message: str) -> str:
        for rule in jobset["spec"]["failurePolicy"]["rules"]:
            if all(re.search(pattern, message) for pattern in rule.get("onJobFailureMessagePatterns", [])):
                return rule["action"]

    # As the Job controller words it.
    ended = (
        "Container sslx for pod default/sslx-slice-0-3-x7b2c failed with exit code {} matching FailJob rule at index 0"
    )
    evicted = "Pod default/sslx-slice-0-3-x7b2c has condition DisruptionTarget matching FailJob rule at index 1"
    assert action(ended.format(2)) == "FailJobSet"
    assert action(ended.format(75)) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(evicted) == "RestartJobSetAndIgnoreMaxRestarts"
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_the_pods_of_the_gpu_comment_find_the_first_by_the_name_jobset_gives_it(jobset):
    name, job = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]["name"]
    assert f"coordinator={name}-{job}-0-0.{jobset['spec']['network']['subdomain']}:" in TEXT
    assert jobset["spec"]["network"]["enableDNSHostnames"]


@pytest.fixture
def run(jobset, tmp_path):
    """Runs the container's command in a folder like the image's, beside a stand-in for python."""
    container = pod_of(jobset)["containers"][0]
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit "$CODE"\n')
    python.chmod(0o755)

    def start(folder: str, code: int) -> subprocess.CompletedProcess:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RUN": folder, "CODE": str(code)}
        command = [*container["command"], *container["args"]]
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)

    return start


def test_the_container_trains_into_the_run_folder_and_ends_with_its_code(run):
    ended = run("gs://bucket/my run", 3)
    assert ended.returncode == 3
    assert ended.stdout.splitlines()[:3] == ["-m", "sslx.main", "--workdir=gs://bucket/my run"]
    assert "--config=configs/bert_mlm.py:base" in ended.stdout.splitlines()


def test_an_unset_run_folder_is_refused_in_one_line(run, jobset):
    variables = {variable["name"]: variable["value"] for variable in pod_of(jobset)["containers"][0]["env"]}
    assert variables["RUN"] == ""
    ended = run("", 0)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: RUN is not set; set it in launch/gke_jobset.yaml\n"
