"""What docs/deploy promises of the server is true of the server: flags, paths, metrics, and that it may take as long as it needs to end."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.main import get_command

from dite.cli import main
from dite.cli.app import app as command_line
from dite.server.app import create_app
from dite.server.listen import GRACE_S
from dite.server.metrics import Metrics
from dite.server.settings import ServerSettings

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"
METRIC = re.compile(r"\bdite_[a-z_]+")


@pytest.fixture
def pod():
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
    assert [document["kind"] for document in documents] == ["Deployment", "Service", "PodDisruptionBudget"]
    labels = documents[0]["spec"]["template"]["metadata"]["labels"]
    assert (
        labels
        == documents[0]["spec"]["selector"]["matchLabels"]
        == documents[1]["spec"]["selector"]
        == documents[2]["spec"]["selector"]["matchLabels"]
    )
    return documents[0]["spec"]["template"]["spec"]


@pytest.fixture
def image():
    """Instructions of the Dockerfile, continued lines joined; of those that come twice, the last."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"))
    return dict(line.split(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))


@pytest.fixture
def settings_of(tmp_path, capsys):
    """The settings that `dite serve ARGUMENTS` would run with, the container's key file standing in another place here."""
    (tmp_path / "key").write_text("a-key-of-more-than-16-characters\n")

    def settings(arguments):
        here = [re.sub(r"/run/secrets/[\w/]+", str(tmp_path / "key"), argument) for argument in arguments]
        capsys.readouterr()
        code, (out, err) = main(["serve", *here, "--dry-run", "--json"]), capsys.readouterr()
        assert code == 0, out + err
        return json.loads(out)["settings"]

    return settings


def paths():
    service = SimpleNamespace(settings=ServerSettings(model="m"), metrics=Metrics(), card=None, state="starting")
    return {route.path for route in create_app(service).routes}


def shown():
    """Every name on a page of metrics where everything has happened once."""
    metrics = Metrics()
    metrics.request_done(200, 0.1)
    metrics.exchange(0, 1, 1)
    metrics.rank(0, 1, 1)
    return set(METRIC.findall("\n".join(line for line in metrics.render()[0].decode().splitlines() if not line.startswith("#"))))


def test_every_panel_asks_for_metrics_that_there_are():
    board = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    asked = [set(METRIC.findall(target["expr"])) for panel in board["panels"] for target in panel["targets"]]
    assert all(asked) and set().union(*asked) <= shown()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_dashboard_shows_every_metric_but_process_ids():
    text = (DEPLOY / "grafana.json").read_text(encoding="utf-8")
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in shown()}
    families = {name for name in families if f"{name}_total" not in families}  # of a counter's creation
    assert {name for name in families if name not in text} == {"dite_rank_pid"}


def test_the_readme_speaks_of_metrics_that_there_are():
    named = set(METRIC.findall((DEPLOY / "README.md").read_text(encoding="utf-8"))) - {"dite_api_key"}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown()}
    assert named and named <= families


def test_probes_ask_for_paths_that_there_are_and_wait_for_the_start(pod, settings_of):
    container = pod["containers"][0]
    probes = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert probes == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"} and set(probes.values()) <= paths()
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > settings_of(container["args"])["startup_timeout_s"]


def test_a_pod_is_given_the_time_to_drain_and_the_port_that_it_listens_on(pod, settings_of):
    container = pod["containers"][0]
    settings = settings_of(container["args"])
    pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pause_s + settings["drain_timeout_s"] + 2 * GRACE_S
    assert settings["port"] == container["ports"][0]["containerPort"] and settings["host"] == "0.0.0.0"


def test_a_pod_writes_only_where_something_is_mounted(pod, image):
    container = pod["containers"][0]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] and set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    folders = dict(word.split("=") for word in image["ENV"].split())
    assert {Path(folders[name]).parts[1] for name in ("HOME", "DITE_CACHE", "HF_HOME")} == {"cache"} and {"/cache", "/tmp"} <= mounts.keys()
    key = next(argument for argument in container["args"] if argument.startswith("--api-key-file="))
    assert str(Path(key.partition("=")[2]).parent) in mounts


def test_the_image_starts_a_server_as_somebody_who_is_not_root(image, pod, settings_of):
    assert json.loads(image["ENTRYPOINT"]) == ["dite", "serve"]
    settings = settings_of(json.loads(image["CMD"]))
    assert settings["host"] == "0.0.0.0" and str(settings["port"]) == image["EXPOSE"]
    assert image["USER"] == f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" != "0:0"
    path = re.search(rf":{settings['port']}(/\w+)", image["HEALTHCHECK"])[1]
    assert path == "/health" and path in paths()


def test_the_image_is_made_of_what_there_is(image):
    root = DEPLOY.parents[1]
    lines = [line.split() for line in (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines() if line.startswith("COPY ")]
    copied = {source for line in lines for source in line[1:-1]}
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")}
    assert copied == kept and all((root / name).exists() for name in copied)


def test_flags_in_the_readme_are_flags_of_the_command():
    serve = get_command(command_line).commands["serve"]
    known = {word for parameter in serve.params for word in parameter.opts}
    text = (DEPLOY / "README.md").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for line in text.splitlines() if re.search(r"\bdite serve\b.* --|\bdite +/models", line)]
    used = {flag for line in lines for flag in re.findall(r"--[a-z-]+", re.split(r"dite serve|dite +/models", line, maxsplit=1)[1].split("#")[0])}
    assert len(used) >= 5 and used <= known
