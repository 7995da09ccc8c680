"""``docs/operations.md``, the dashboard and the files in ``docs/deploy`` say what the program does."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import trustme
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families

from rbee_worker import __version__
from rbee_worker.cli.app import app
from rbee_worker.config import MAX_STOP_LENGTH, MAX_STOP_SEQUENCES, EngineConfig, ServerConfig
from rbee_worker.server import run
from rbee_worker.server.http import access, protocol
from rbee_worker.server.http.operation import routes
from rbee_worker.server.native.routes import AllowedModels, Native
from rbee_worker.server.observe.metrics import WorkerMetrics
from rbee_worker.worker.broadcast import LoadingBroadcast
from tests.unit.samples import LOAD

ROOT = Path(__file__).parents[3]
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
DOCS = ROOT / "docs"
PAGE = (DOCS / "operations.md").read_text("utf-8")
SERVE = typer.main.get_command(app).commands["serve"]
OPTIONS = {name for parameter in SERVE.params for name in parameter.opts}
PATHS = {route.path for route in routes(Native(None, ServerConfig(), AllowedModels(None), None))}


@pytest.fixture(scope="module")
def families():
    """What the page of a worker with keys, a model and a load has: name as sampled -> names of its labels."""
    from tests.unit.server.conftest import StandInWorker

    worker = StandInWorker()
    worker.loads.broadcast = LoadingBroadcast()
    for event in LOAD:
        worker.loads.broadcast.publish(event)
    metrics = WorkerMetrics(worker, by_client=True)
    metrics.responded("GET", "/livez", 200)
    figures = worker.jobs.observers[0]
    figures._client_requests["c"] = figures._client_tokens["c", "prompt"] = 1
    found = {}
    for family in text_string_to_metric_families(metrics.render(worker.memory()).decode()):
        labels = {label for sample in family.samples for label in sample.labels}
        found[family.name + ("_total" if family.type == "counter" else "")] = labels - {"le"}
    return found


def test_names_fit_prometheus_conventions():
    """What ``promtool check metrics`` asks of names, on every family that there is."""
    from tests.unit.server.conftest import StandInWorker

    worker = StandInWorker()
    worker.broadcast = LoadingBroadcast()
    for event in LOAD:
        worker.broadcast.publish(event)
    for family in WorkerMetrics(worker, by_client=True).collect():
        name = family.name
        assert re.fullmatch(r"rbee_[a-z0-9]+(_[a-z0-9]+)*", name), name
        # The library adds what belongs to a kind: of no kind's name may these be a part.
        assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_info", "_created")), name
        assert not re.search(r"_(gauge|counter|histogram|summary)(_|$)", name), name
        # Base units, at the end, in words.
        assert not re.search(r"_(ms|milliseconds|kib|mib|mb|kb|percent|minutes)(_|$)", name), name
        for unit in ("seconds", "bytes"):
            assert f"_{unit}" not in name.removesuffix("_per_second").removesuffix(f"_{unit}"), name
        assert re.fullmatch(r"[A-Z0-9].*\.", family.documentation), name


def parsed(command):
    """Checks a command line of the program: ``serve``, and options that it has."""
    name, *arguments = command
    assert name == "serve"
    context = SERVE.make_context("serve", list(arguments), resilient_parsing=False)
    return context.params


def test_the_table_of_metrics_is_the_page(families):
    rows = re.findall(r"^\| `(rbee_\w+)(?:\{([\w,]+)\})?` \|", PAGE, re.MULTILINE)
    described = {name: set(labels.split(",")) - {""} for name, labels in rows}
    assert len(rows) == len(described)
    described["rbee_worker_info"] = {"id", "version", "model"}  # said in words
    assert described == families


def test_the_dashboard_asks_for_every_metric_and_no_other(families):
    dashboard = json.loads((DOCS / "grafana" / "rbee-worker.json").read_text("utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    asked = set()
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            names = set(re.findall(r"rbee_\w+", target["expr"]))
            assert names, target["expr"]
            assert all(f'{name}{{instance=~"$instance"' in target["expr"] for name in names), target["expr"]
            assert target["expr"].count("(") == target["expr"].count(")"), target["expr"]
            asked |= names
            for labels in re.findall(r"sum by \(([\w, ]+)\)", target["expr"]):
                known = set().union(*(families[base(name, families)] for name in names)) | {"le"}
                assert set(labels.split(", ")) <= known, target["expr"]
    assert {base(name, families) for name in asked} == set(families)


def base(name, families):
    """The family that a sample belongs to."""
    stem = re.sub(r"_(bucket|sum|count)$", "", name)
    found = name if name in families else stem
    assert found in families, f"{name} is not on the page"
    return found


def test_panels_do_not_overlap():
    dashboard = json.loads((DOCS / "grafana" / "rbee-worker.json").read_text("utf-8"))
    taken = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert {"datasource", "instance"} == variables.keys()


def test_the_limits_are_the_programs():
    server, engine = ServerConfig(), EngineConfig()
    for what, figure in {
        "connections": f"{server.max_connections}",
        "connections beyond those": f"{protocol.SPARE_CONNECTIONS}",
        "a request's head": f"{access.MAX_HEADERS} headers, {access.MAX_HEAD_BYTES // 1024} KiB",
        "until a head is whole": f"{server.header_seconds:g} s",
        "a body": f"{server.max_body_bytes // 2**20} MiB",
        "until a body is whole": f"{server.body_seconds:g} s",
        "between two requests": f"{server.idle_seconds:g} s",
        "bytes of a stream that its client leaves unread": f"{server.send_timeout_seconds:g} s",
        "stop strings": f"{MAX_STOP_SEQUENCES} of {MAX_STOP_LENGTH} characters",
        "requests in one step": f"{engine.max_batch_size}",
        "requests that wait": f"{server.max_queue}",
    }.items():
        assert f"\n| {what} | {figure} |" in PAGE, what


def test_every_option_and_path_of_the_page_exists():
    own = PAGE.replace("--addr HOST", "")
    assert set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", own)) <= OPTIONS
    assert set(re.findall(r"`(/[a-z][\w/]*)`", PAGE)) <= PATHS
    open_paths = re.search(r"Everything asks for a key but (.*?)\. Without", PAGE, re.DOTALL)
    assert set(re.findall(r"`([^`]+)`", open_paths[1])) == access.OPEN_PATHS


def documents():
    return list(yaml.safe_load_all((DOCS / "deploy" / "kubernetes.yaml").read_text("utf-8")))


def test_kubernetes():
    service, claim, deployment = documents()
    kinds = [document["kind"] for document in (service, claim, deployment)]
    assert kinds == ["Service", "PersistentVolumeClaim", "Deployment"]
    pod = deployment["spec"]["template"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    (container,) = pod["spec"]["containers"]
    assert container["image"] == f"rbee-worker:{__version__}"
    assert container["imagePullPolicy"] == "IfNotPresent"
    (port,) = container["ports"]
    params = parsed(container["args"])
    assert params["addr"].endswith(f":{port['containerPort']}")
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    probes = {name: container[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {probe["path"] for probe in probes.values()} <= access.OPEN_PATHS & PATHS
    assert [probe["path"] for probe in probes.values()] == ["/livez", "/livez", "/readyz"]
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert str(params["api_key_file"]).startswith(mounts["keys"])
    claims = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["spec"]["volumes"]
        if len(volume) > 1 and "persistentVolumeClaim" in volume
    ]
    assert claims == [claim["metadata"]["name"]]
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    needed = pause + params["shutdown_grace"] + run._OVERTIME_SECONDS + run.FLUSH_SECONDS
    assert pod["spec"]["terminationGracePeriodSeconds"] > needed


def test_systemd():
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str
    unit.read_string((DOCS / "deploy" / "rbee-worker.service").read_text("utf-8"))
    service = unit["Service"]
    program, *command = shlex.split(service["ExecStart"])
    params = parsed(command)
    assert Path(program).name == "rbee-worker"
    assert service["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert int(service["TimeoutStopSec"]) > params["shutdown_grace"] + run._OVERTIME_SECONDS + run.FLUSH_SECONDS
    beside = protocol.SPARE_CONNECTIONS + protocol.OTHER_FILES
    assert int(service["LimitNOFILE"]) >= ServerConfig().max_connections + beside
    codes = re.findall(r"^\| (\d+) \|", (DOCS / "cli.md").read_text("utf-8"), re.MULTILINE)
    assert set(service["RestartPreventExitStatus"].split()) <= set(codes)


def test_docker():
    lines = (DOCS / "deploy" / "Dockerfile").read_text("utf-8").replace("\\\n", " ").splitlines()
    comments = [line for line in (DOCS / "deploy" / "Dockerfile").read_text("utf-8").splitlines() if line[:1] == "#"]
    assert re.findall(r"rbee-worker:([\d.]+)", "\n".join(comments)) == [__version__] * 2
    steps = [line.split(None, 1) for line in lines if line and not line.startswith("#")]
    last = dict(steps)
    assert last["USER"].split(":")[0].isdecimal()
    assert last["USER"].split(":")[0] != "0"
    assert json.loads(last["ENTRYPOINT"]) == ["rbee-worker"]
    params = parsed(json.loads(last["CMD"]))
    assert params["addr"].endswith(f":{last['EXPOSE']}")
    assert f":{last['EXPOSE']}/livez" in last["HEALTHCHECK"]
    for source in [name for word, rest in steps if word == "COPY" for name in rest.split()[:-1]]:
        assert (ROOT / source).exists(), source
    extras = re.search(r"'\.\[([\w,]+)\]'", "\n".join(lines))[1].split(",")
    assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text("utf-8") for extra in extras)
    python = re.match(r"python:(\d+\.\d+)", last["FROM"])[1]
    assert f'requires-python = ">={python}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_nginx():
    text = re.sub(r"#.*", "", (DOCS / "deploy" / "nginx.conf").read_text("utf-8"))
    assert text.count("{") == text.count("}")
    assert all(line.rstrip().endswith((";", "{", "}")) for line in text.splitlines() if line.strip())
    directives = dict(re.findall(r"^\s*(\w+) (.+);$", text, re.MULTILINE))
    server = ServerConfig()
    assert directives["server"] == f"127.0.0.1:{server.port}"
    assert directives["proxy_buffering"] == "off"
    assert int(directives["client_max_body_size"].removesuffix("m")) * 2**20 == server.max_body_bytes
    assert int(directives["keepalive_timeout"].removesuffix("s")) < server.idle_seconds
    assert set(re.findall(r"location = (\S+)", text)) <= PATHS


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_nginx_takes_its_file(tmp_path):
    cert = trustme.CA().issue_cert("llm.example.org")
    cert.private_key_and_cert_chain_pem.write_to_path(tmp_path / "both.pem")
    text = (DOCS / "deploy" / "nginx.conf").read_text("utf-8").replace("listen 443 ", "listen 127.0.0.1:18443 ")
    text = re.sub(r"/etc/nginx/llm\.example\.org\.(pem|key)", str(tmp_path / "both.pem"), text)
    for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
        text += f"{what}_temp_path {tmp_path / what};\n"
    whole = f"pid {tmp_path / 'pid'};\nevents {{}}\nhttp {{\naccess_log off;\n{text}}}\n"
    (tmp_path / "nginx.conf").write_text(whole)
    command = [NGINX, "-t", "-p", tmp_path, "-c", tmp_path / "nginx.conf", "-e", tmp_path / "error.log"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_not_published_is_installed_from_a_checkout():
    files = [*ROOT.glob("rbee_worker/**/*.py"), *ROOT.glob("docs/**/*"), ROOT / "README.md"]
    told = [path.read_text("utf-8") for path in files if path.is_file()]
    assert not any("install 'rbee-worker[" in text or "install rbee-worker" in text for text in told)
    extras = {extra for text in told for extra in re.findall(r"pip install '\.\[(\w+)\]'", text)}
    assert {"hub", "grammar", "otel"} <= extras
