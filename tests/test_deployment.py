"""Dockerfile, compose.yaml and the manifests for Kubernetes name only what there is: commands, options, routes, paths,
versions. No image is built here; docs/container.md says what was.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.specifiers import SpecifierSet

from search_r3.cli import commands

ROOT = Path(__file__).resolve().parents[1]
KUBERNETES = sorted((ROOT / "examples" / "deployment" / "kubernetes").glob("*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PYTHONS = SpecifierSet(PROJECT["requires-python"])
OTHERS_VARIABLES = {
    "PATH", "HOME", "HF_HOME", "OMP_NUM_THREADS", "NUMBA_CACHE_DIR", "PIP_NO_CACHE_DIR",
    "PIP_DISABLE_PIP_VERSION_CHECK",
}  # fmt: skip
"""Variables that are not ours, and that somebody reads."""


@dataclass(frozen=True)
class Step:
    """One instruction of a Dockerfile: RUN, COPY, ..."""

    kind: str
    rest: str

    @property
    def words(self) -> list[str]:
        """The words, of a JSON array or of a line."""
        return json.loads(self.rest) if self.rest.startswith("[") else shlex.split(self.rest)


def dockerfile() -> list[list[Step]]:
    """The stages of the Dockerfile; the first holds what is before FROM."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ").splitlines()
    stages: list[list[Step]] = [[]]
    for line in filter(str.strip, lines):
        kind, _, rest = line.partition(" ")
        if kind == "FROM":
            stages.append([])
        stages[-1].append(Step(kind, " ".join(rest.split())))
    return stages


def steps(kind: str, stage: int = -1) -> list[Step]:
    return [step for step in dockerfile()[stage] if step.kind == kind]


def arguments() -> dict[str, str]:
    return dict(step.rest.split("=", 1) for stage in dockerfile() for step in stage if step.kind == "ARG")


def variables() -> dict[str, str]:
    """What ENV of the image sets."""
    return dict(word.split("=", 1) for step in steps("ENV") for word in step.words)


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def manifests() -> Iterator[dict[str, Any]]:
    for path in KUBERNETES:
        yield from yaml.safe_load_all(path.read_text(encoding="utf-8"))


def pods() -> list[dict[str, Any]]:
    return [one["spec"]["template"]["spec"] for one in manifests() if "template" in one["spec"]]


def containers() -> list[dict[str, Any]]:
    return [container for pod in pods() for container in pod["containers"]]


def command_lines() -> list[list[str]]:
    """The arguments of search-r3 in all files."""
    lines = [steps("CMD")[0].words]
    lines += [service["command"] for service in compose()["services"].values()]
    return lines + [container["args"] for container in containers()]


def option(line: list[str], name: str) -> str | None:
    words = " ".join(line).replace("=", " ").split()
    return words[words.index(name) + 1] if name in words else None


@pytest.mark.parametrize("line", command_lines(), ids=lambda line: line[0])
def test_every_command_line_is_one_of_ours(line: list[str]) -> None:
    app: Any = typer.main.get_command(commands.app)
    command = app.commands[line[0]]
    context = command.make_context(line[0], list(line[1:]))  # fails where an option or a value is none
    if line[0] == "serve":
        assert context.params["host"] == "0.0.0.0"
        assert context.params["port"] == 8000


def test_ports_and_probes_are_those_of_the_server() -> None:
    assert steps("ENTRYPOINT")[0].words == ["search-r3"]
    assert steps("EXPOSE")[0].rest == "8000"
    server = compose()["services"]["server"]
    assert [port.rsplit(":", 1)[-1] for port in server["ports"]] == ["8000"]
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])
    checks = [steps("HEALTHCHECK")[0].rest.partition("CMD ")[2], json.dumps(server["healthcheck"]["test"][1:])]
    routes = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "search_r3" / "server").rglob("*.py"))
    for check in checks:
        words = json.loads(check)
        assert words[0] == "python3"
        compile(words[2], "health check", "exec")
        assert re.search(r"http://127\.0\.0\.1:8000(/\w+)'", words[2])[1] == "/readyz"  # type: ignore[index]
    (serving,) = (container for container in containers() if container["args"][0] == "serve")
    assert serving["ports"] == [{"name": "http", "containerPort": 8000}]
    for probe, route in (("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")):
        assert serving[probe]["httpGet"] == {"path": route, "port": "http"}
        assert f'"{route}"' in routes


def test_stopping_is_given_the_time_that_it_may_take() -> None:
    line = compose()["services"]["server"]["command"]
    wanted = int(option(line, "--pause") or 0) + int(option(line, "--grace") or 30)
    assert int(compose()["services"]["server"]["stop_grace_period"].removesuffix("s")) > wanted
    for pod in pods():
        line = pod["containers"][0]["args"]
        if line[0] == "serve":
            wanted = int(option(line, "--pause") or 0) + int(option(line, "--grace") or 30)
            assert pod["terminationGracePeriodSeconds"] > wanted


def test_nobody_is_root_and_nothing_may_be_gained() -> None:
    user = steps("USER")[-1].rest
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    number = int(user.partition(":")[0])
    last = max(i for i, step in enumerate(dockerfile()[-1]) if step.kind in ("RUN", "COPY"))
    assert dockerfile()[-1].index(steps("USER")[-1]) > last
    for service in compose()["services"].values():
        assert service["user"] == user
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    for pod in pods():
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == number
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False  # SEARCH_R3_PORT=tcp://... would be the service's
    for container in containers():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip


def test_what_is_written_is_on_a_volume() -> None:
    """The root is read-only: the folders that variables and commands name are mounted, and made for the user."""
    made = {word for step in steps("RUN") for word in step.words if word.startswith("/")}
    written = {variables()[name] for name in ("HOME", "SEARCH_R3_CACHE", "HF_HOME", "NUMBA_CACHE_DIR")}
    written |= {into for line in command_lines() if (into := option(line, "--into"))}
    tops = {"/" + path.split("/")[1] for path in written}
    assert tops == {"/cache", "/data"}
    assert tops <= made
    for service in compose()["services"].values():
        mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in service["volumes"]}
        assert tops <= mounted.keys()
        assert {mounted[top] for top in tops} <= compose()["volumes"].keys()
        assert "/tmp" in service["tmpfs"]
    for pod in pods():
        (container,) = pod["containers"]
        mounted = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert tops | {"/tmp"} <= {path for path, mount in mounted.items() if not mount.get("readOnly")}
        assert {mount["name"] for mount in mounted.values()} == {volume["name"] for volume in pod["volumes"]}


def test_the_index_that_is_served_is_the_one_that_is_made() -> None:
    services = compose()["services"]
    assert services["server"]["command"][1] == option(services["index"]["command"], "--into")
    served = [container["args"][1] for container in containers() if container["args"][0] == "serve"]
    assert served == [
        option(container["args"], "--into") for container in containers() if container["args"][0] == "index"
    ]
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods()
        for volume in pod["volumes"]
        if volume["name"] == "data"
    ]
    assert set(claims) == {one["metadata"]["name"] for one in manifests() if one["kind"] == "PersistentVolumeClaim"}


def test_the_service_finds_the_servers() -> None:
    (service,) = (one["spec"] for one in manifests() if one["kind"] == "Service")
    (deployment,) = (one["spec"] for one in manifests() if one["kind"] == "Deployment")
    assert service["selector"] == deployment["selector"]["matchLabels"] == deployment["template"]["metadata"]["labels"]
    assert service["ports"][0]["targetPort"] == "http"


def test_every_variable_is_read_by_somebody() -> None:
    explained = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    named = {
        word.split("=", 1)[0] for stage in dockerfile() for step in stage if step.kind == "ENV" for word in step.words
    }
    named |= {name for service in compose()["services"].values() for name in service.get("environment", {})}
    named |= {variable["name"] for container in containers() for variable in container.get("env", [])}
    ours = {name for name in named if name.startswith("SEARCH_R3_")}
    assert ours
    assert all(f"`{name}`" in explained for name in ours)
    assert named - ours <= OTHERS_VARIABLES


def test_the_versions_are_the_locked_ones() -> None:
    chosen = arguments()
    assert chosen["WEIGHTS"] in re.search(r"^WEIGHTS := (.+)$", MAKEFILE, re.M)[1].split()  # type: ignore[index]
    assert set(chosen["EXTRAS"].split(",")) <= PROJECT["optional-dependencies"].keys()
    base = re.search(r"python:(\d+\.\d+)-", chosen["BASE"])
    assert base
    assert f"{base[1]}.0" in PYTHONS
    runs = [step.rest for step in steps("RUN", 1)]
    installs = [one for run in runs for one in re.split(r"&&|;|then|else", run) if "pip install" in one]
    assert len(installs) == 4
    for install in installs:
        constrained = "PIP_CONSTRAINT=constraints.txt" in install or "--constraint constraints.txt" in install
        assert constrained or "--no-deps" in install
    (pattern,) = re.findall(r"sed -n '(.+?)' constraints", runs[1])
    assert pattern == r"s/^\(torch==[^ ;]*\).*/\1/p"
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert len(re.findall(r"^torch==[^ ;]*", constraints, re.M)) == 1


def test_without_a_choice_there_is_no_cuda_in_it() -> None:
    assert arguments()["TORCH_INDEX"].endswith("/cpu")
    (torch,) = (step.rest for step in steps("RUN", 1) if "TORCH_INDEX" in step.rest)
    assert re.search(r'if \[ -n "\$TORCH_INDEX" \]; then pip install --no-deps --index-url "\$TORCH_INDEX"', torch)
    args = compose()["services"]["server"]["build"]["args"]
    assert args == {"TORCH_INDEX": f"${{TORCH_INDEX-{arguments()['TORCH_INDEX']}}}"}  # `TORCH_INDEX=` chooses CUDA


def test_the_build_gets_what_it_copies_and_nothing_else() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] not in "#"]

    def sent(name: str) -> bool:
        kept = True
        for rule in rules:
            if fnmatch(name, rule.removeprefix("!").removeprefix("**/")):
                kept = rule.startswith("!")
        return kept

    needed = {"pyproject.toml", "constraints.txt", PROJECT["readme"], *PROJECT["license-files"], "search_r3"}
    links = [path for path in (ROOT / "search_r3" / "adapters").iterdir() if path.is_symlink()]
    needed |= {path.resolve().relative_to(ROOT).parts[0] for path in links}
    assert all(sent(name) for name in needed)
    assert {name for name in os.listdir(ROOT) if sent(name)} == needed
    assert not sent("__pycache__")
    copied = {word for step in steps("COPY", 1) for word in step.words[:-1]}
    assert copied == {"constraints.txt", "."}


def test_the_manifests_are_valid() -> None:
    """Against the schemas of Kubernetes itself, strictly: an unknown field is an error."""
    validate = pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate")
    found = list(manifests())
    assert {one["kind"] for one in found} == {"PersistentVolumeClaim", "Deployment", "Service", "Job"}
    for one in found:
        validate.validate(one, validate.latest_version(), strict=True)


def test_a_wrong_option_would_be_noticed() -> None:
    app: Any = typer.main.get_command(commands.app)
    with pytest.raises(Exception, match="No such option"):
        app.commands["serve"].make_context("serve", ["/data/index", "--workers", "2"])
