"""What is shipped for clouds: accepted by schemas and linters, and as frugal as promised."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from cluster.cluster_file import cluster_file_checks, load_cluster_file
from transcribe.errors import Fatal
from transcribe.prices import price_list

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "ray-cluster.yaml"
RAYJOB = yaml.safe_load((ROOT / "cluster" / "rayjob.yaml").read_text())
OWN_LAUNCHER = yaml.safe_load(LAUNCHER.read_text())
WORKERS = [k for k in OWN_LAUNCHER["available_node_types"] if k != "head"]


# ---------------------------------------------------------------- ray up


def test_ray_accepts_the_launcher_file():
    prepared = load_cluster_file(LAUNCHER)
    assert prepared["head_node_type"] == "head"
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


def test_googles_node_provider_takes_the_node_configurations():
    from ray.autoscaler._private.gcp.config import get_node_type
    from ray.autoscaler._private.gcp.node import GCPNodeType

    for kind in OWN_LAUNCHER["available_node_types"].values():
        assert get_node_type(kind["node_config"]) == GCPNodeType.COMPUTE


def test_the_head_runs_nothing_and_workers_come_and_go():
    kinds = OWN_LAUNCHER["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in OWN_LAUNCHER["head_start_ray_commands"][-1]
    assert "--disable-usage-stats" in OWN_LAUNCHER["head_start_ray_commands"][-1]
    assert len(WORKERS) == 2
    assert all(kinds[name]["min_workers"] == 0 for name in WORKERS)
    assert sum(kinds[name]["max_workers"] for name in WORKERS) <= OWN_LAUNCHER["max_workers"]
    assert OWN_LAUNCHER["idle_timeout_minutes"] <= 10
    assert OWN_LAUNCHER["provider"]["cache_stopped_nodes"] is False


def test_the_bill_knows_every_machine_and_its_price():
    price = price_list(None, None)
    kinds = OWN_LAUNCHER["available_node_types"]
    for name in WORKERS:
        machine = kinds[name]["node_config"]["machineType"]
        assert kinds[name]["labels"] == {"machine-type": machine, "ray.io/market-type": "spot"}
        assert price(f"{machine}:spot") < price(machine)
    head = kinds["head"]["node_config"]["machineType"]
    assert f"--labels=machine-type={head} " in OWN_LAUNCHER["head_start_ray_commands"][-1]
    assert price(head) > 0


@pytest.mark.parametrize("name", WORKERS)
def test_workers_are_on_spot_and_may_only_touch_storage(name):
    config = OWN_LAUNCHER["available_node_types"][name]["node_config"]
    assert config["scheduling"]["provisioningModel"] == "SPOT"
    assert config["scheduling"]["instanceTerminationAction"] == "DELETE"
    (account,) = config["serviceAccounts"]
    assert account["scopes"] == ["https://www.googleapis.com/auth/devstorage.read_write"]
    assert account["email"].startswith("transcribe-worker@")
    assert config["labels"]["app"] == "transcribe"


def test_a_gpu_machine_waits_for_its_driver_before_the_container_starts():
    commands = OWN_LAUNCHER["available_node_types"]["gpu"]["initialization_commands"]
    assert any("nvidia-smi" in command and "timeout" in command for command in commands)
    # A type's own commands replace the common ones; the login must not get lost.
    assert any("configure-docker" in command for command in commands)


def test_every_machine_runs_the_same_image_of_this_version():
    head = RAYJOB["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    groups = RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pods = [head, *(group["template"] for group in groups)]
    images = {c["image"] for pod in pods for c in pod["spec"]["containers"]}
    images.add(OWN_LAUNCHER["docker"]["image"])
    (image,) = images
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{image.rpartition(":")[2]}"' in project


def _checks(path, home):
    return {check.name: check for check in cluster_file_checks(path, home)}


def test_what_was_left_to_replace_is_named_with_its_lines(tmp_path):
    check = _checks(LAUNCHER, tmp_path)["placeholders"]
    assert check.outcome == "failure"
    lines = LAUNCHER.read_text().splitlines()
    named = [int(n) for n in check.found.rpartition("lines ")[2].split(",")]
    assert named == [
        n for n, line in enumerate(lines, 1) if "MY-PROJECT" in line and line[0] != "#"
    ]


def test_a_finished_file_and_a_token_are_ready(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(LAUNCHER.read_text().replace("MY-PROJECT", "calls-4711"))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    found = _checks(path, tmp_path)
    assert {check.outcome for check in found.values()} == {"ok"}
    assert "0 to 24 machines" in found["size"].found
    (tmp_path / ".ray" / "auth_token").unlink()
    assert "get-auth-token" in _checks(path, tmp_path)["token"].remedy


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("provider"),
        lambda c: c.update(max_worker=3),
        lambda c: c.update(max_workers="many"),
        lambda c: c.update(head_node_type="chief"),
        lambda c: c["docker"].update(images="x"),
    ],
)
def test_what_ray_would_refuse_is_one_sentence(tmp_path, damage):
    content = copy.deepcopy(OWN_LAUNCHER)
    damage(content)
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(Fatal, match=r"broken\.yaml") as refused:
        load_cluster_file(path)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_yaml_is_one_sentence(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: [")
    (check,) = cluster_file_checks(path, tmp_path)
    assert check.outcome == "failure"
    assert "cannot be read as YAML" in check.found


# ---------------------------------------------------------------- Kubernetes

# Fields of KubeRay's API reference (ray.io/v1, KubeRay 1.6); pods are checked with Kubernetes'
# own schema.
RAYJOB_FIELDS = {
    "entrypoint", "backoffLimit", "submissionMode", "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished", "rayClusterSpec", "activeDeadlineSeconds", "runtimeEnvYAML",
    "submitterPodTemplate", "submitterConfig", "metadata", "jobId", "suspend", "clusterSelector",
}  # fmt: skip
RAYCLUSTER_FIELDS = {
    "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
    "workerGroupSpecs", "suspend", "managedBy", "gcsFaultToleranceOptions",
}  # fmt: skip
AUTOSCALER_FIELDS = {
    "version", "upscalingMode", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources",
    "securityContext", "env", "envFrom", "volumeMounts",
}  # fmt: skip
GROUP_FIELDS = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template",
    "numOfHosts", "idleTimeoutSeconds", "scaleStrategy", "suspend", "labels", "resources",
}  # fmt: skip


def test_the_rayjob_uses_documented_fields_only():
    assert (RAYJOB["apiVersion"], RAYJOB["kind"]) == ("ray.io/v1", "RayJob")
    spec = RAYJOB["spec"]
    cluster = spec["rayClusterSpec"]
    assert spec.keys() <= RAYJOB_FIELDS
    assert cluster.keys() <= RAYCLUSTER_FIELDS
    assert cluster["autoscalerOptions"].keys() <= AUTOSCALER_FIELDS
    assert all(group.keys() <= GROUP_FIELDS for group in cluster["workerGroupSpecs"])
    assert cluster["headGroupSpec"].keys() <= {"rayStartParams", "template", "serviceType"}
    assert all(isinstance(v, str) for v in cluster["headGroupSpec"]["rayStartParams"].values())


def test_the_rayjob_comes_from_nothing_and_leaves_nothing():
    spec = RAYJOB["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert all(group["minReplicas"] == group["replicas"] == 0 for group in groups)
    assert any("nvidia.com/gpu" in str(group) for group in groups)


def _pods():
    cluster = RAYJOB["spec"]["rayClusterSpec"]
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


@pytest.mark.parametrize(("name", "template"), list(_pods()))
def test_kubernetes_accepts_the_pods(name, template):
    pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
    pod["metadata"]["name"] = name
    kubernetes_validate.validate(pod, "1.32", strict=True)
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True


def test_kubernetes_accepts_the_weekly_run():
    weekly = yaml.safe_load((ROOT / "cluster" / "cronjob.yaml").read_text())
    kubernetes_validate.validate(weekly, "1.32", strict=True)


def test_the_rayjobs_ray_is_the_locked_one():
    locked = (ROOT / "requirements.lock").read_text().split()
    assert f"ray=={RAYJOB['spec']['rayClusterSpec']['rayVersion']}" in locked


# ---------------------------------------------------------------- the image


def test_the_linter_has_nothing_to_say_of_the_dockerfile():
    hadolint = Path(sys.executable).parent / "hadolint"
    linted = subprocess.run(
        [hadolint, "--failure-threshold=info", ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert linted.returncode == 0, linted.stdout


def test_the_image_is_pinned_and_does_not_run_as_root():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users
    assert users[-1] not in ("0", "root")
    (python,) = [line.partition("=")[2] for line in lines if line.startswith("ARG PYTHON=")]
    assert python.count(".") == 2
    assert all("${PYTHON}" in line for line in lines if line.startswith("FROM"))
