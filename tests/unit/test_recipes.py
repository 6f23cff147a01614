"""The files of docs/recipes: linters read them, and what they name exists and fits together."""

import ast
import fnmatch
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT
from repository_files import tracked

RECIPES = ROOT / "docs" / "recipes"
DOCKERFILE = RECIPES / "docker" / "Dockerfile"
COMPOSE = RECIPES / "docker" / "compose.yaml"
DASHBOARD = RECIPES / "grafana" / "dashboard.json"
PROVISIONING = RECIPES / "grafana" / "provisioning"
PROMETHEUS = RECIPES / "prometheus" / "prometheus.yml"
ALERTS = RECIPES / "prometheus" / "alerts.yml"
PAGE = RECIPES / "index.md"
YAML = sorted(path for path in RECIPES.rglob("*") if path.suffix in (".yaml", ".yml"))
KUBERNETES = sorted((RECIPES / "kubernetes").glob("*.yaml"))
KUBERNETES_VERSIONS = ("1.30", "1.37")
PORT = 8000

YAMLLINT = """
extends: default
rules:
  comments: {min-spaces-from-content: 1}
  document-start: disable
  line-length: {max: 100}
"""


def load(path):
    return yaml.safe_load(path.read_text())


def linter(module, *arguments):
    """What a linter of .ci/requirements-cpu.txt finds in a file; nothing where it is content."""
    pytest.importorskip(module, reason=".ci/requirements-cpu.txt installs it")
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True
    )
    return done.stdout + done.stderr if done.returncode else ""


def test_yaml_is_tidy():
    assert YAML
    assert not linter("yamllint", "--strict", "-d", YAMLLINT, *YAML)


# Docker


def instructions():
    """The Dockerfile's instructions, each in one line, without comments."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    return [line for line in re.sub(r"\\\n", "", "\n".join(lines)).splitlines() if line.strip()]


def test_hadolint_accepts_the_dockerfile():
    beside = Path(sys.executable).parent
    hadolint = shutil.which("hadolint", path=beside) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip(".ci/requirements-cpu.txt installs hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_image_copies_is_tracked_and_in_its_context():
    rules = [
        line
        for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
        if not line.startswith("#")
    ]
    files = tracked()
    copied = [part for line in instructions() if line.startswith("COPY ") for part in line.split()]
    sources = [part for part in copied if part not in ("COPY", "./") and not part.startswith("--")]
    assert {"pyproject.toml", "setup.py", "vllm_qoq", "merge_tools", "csrc"} <= set(sources)
    for source in sources:
        inside = [name for name in files if name == source or name.startswith(f"{source}/")]
        assert inside, f"{source} is not tracked"
        for name in inside:
            assert not is_ignored(name, rules), name


def is_ignored(name, rules):
    """Whether Docker leaves a file out of a context: the last rule for it or a folder of it."""
    paths = [name, *(str(folder) for folder in Path(name).parents if str(folder) != ".")]
    ignored = False
    for rule in rules:
        pattern = rule.removeprefix("!")
        if any(fnmatch.fnmatch(f"/{path}", f"/{pattern}".replace("/**/", "*/")) for path in paths):
            ignored = not rule.startswith("!")
    return ignored


def test_rules_of_a_context_are_read_as_docker_does():
    rules = ["*", "!csrc", "**/*.so"]
    assert [is_ignored(name, rules) for name in ("a.py", "csrc/kv/a.cu", "csrc/a/b.so")] == [
        True,
        False,
        True,
    ]


def test_the_stages_that_the_image_takes_from_exist():
    lines = instructions()
    stages = {line.split()[-1] for line in lines if re.match(r"FROM .* AS ", line)}
    taken = {found for line in lines for found in re.findall(r"\bfrom=([\w-]+)", line)}
    assert taken and taken <= stages


def test_the_image_has_the_versions_of_the_last_gpu_run():
    (record,) = (ROOT / "tests").rglob("gpu_record.tsv")
    header, *_, last = [line.split("\t") for line in record.read_text().splitlines()]
    run = dict(zip(header, last, strict=True))
    defaults = dict(
        line.split()[1].split("=", 1) for line in instructions() if re.match(r"ARG \w+=", line)
    )
    assert defaults["VLLM_VERSION"] == f"v{run['vllm']}"
    assert defaults["TORCH_VERSION"] == run["torch"]


def test_the_cache_is_kept_where_the_image_has_it():
    (cache,) = (line.split("=")[1] for line in instructions() if "VLLM_CACHE_ROOT" in line)
    assert f"cache:{cache}" in load(COMPOSE)["services"]["vllm"]["volumes"]
    (container,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    assert {"name": "cache", "mountPath": cache} in container["volumeMounts"]


def test_compose_accepts_its_file():
    assert not linter("check_jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE)


def test_the_files_that_compose_names_exist():
    services = load(COMPOSE)["services"]
    build = services["vllm"]["build"]
    assert (COMPOSE.parent / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]) == DOCKERFILE
    volumes = set(load(COMPOSE)["volumes"])
    for name, service in services.items():
        for mount in service.get("volumes", ()):
            source = re.sub(r"\$\{[^}]*\}", "${}", mount).split(":")[0]
            exists = source == "${}" or source in volumes or (COMPOSE.parent / source).exists()
            assert exists, (name, mount)


def test_what_compose_starts_finds_each_other():
    services = load(COMPOSE)["services"]
    scrape, port = load(PROMETHEUS)["scrape_configs"][0], str(PORT)
    assert scrape["static_configs"][0]["targets"] == [f"vllm:{port}"]
    assert services["vllm"]["command"][services["vllm"]["command"].index("--port") + 1] == port
    assert services["vllm"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    (source,) = load(PROVISIONING / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert services["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]
    (provider,) = load(PROVISIONING / "dashboards" / "vllm-qoq.yaml")["providers"]
    (dashboard,) = (mount for mount in services["grafana"]["volumes"] if DASHBOARD.name in mount)
    assert Path(dashboard.split(":")[1]).parent == Path(provider["options"]["path"])


# Kubernetes


def manifest(kind):
    (found,) = (load(path) for path in KUBERNETES if load(path)["kind"] == kind)
    return found


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.stem)
def test_kubernetes_accepts_its_manifests(path, version):
    validator = pytest.importorskip("kubernetes_validate")
    validator.validate(load(path), version, strict=True)


def test_labels_ports_and_claims_of_the_manifests_fit_together():
    deployment, service = manifest("Deployment")["spec"], manifest("Service")["spec"]
    pod = deployment["template"]
    labels, (container,) = pod["metadata"]["labels"], pod["spec"]["containers"]
    monitor = load(RECIPES / "prometheus" / "podmonitor.yaml")["spec"]
    for selector in (
        deployment["selector"]["matchLabels"],
        service["selector"],
        monitor["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": PORT}
    assert container["args"][container["args"].index("--port") + 1] == str(PORT)
    assert {port["targetPort"] for port in service["ports"]} <= set(ports)
    assert {point["port"] for point in monitor["podMetricsEndpoints"]} <= set(ports)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    annotations = pod["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(PORT)
    assert annotations["prometheus.io/path"] == monitor["podMetricsEndpoints"][0]["path"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == volumes.keys()
    claim = volumes["models"]["persistentVolumeClaim"]["claimName"]
    assert claim == manifest("PersistentVolumeClaim")["metadata"]["name"]
    assert container["args"][0].startswith(f"{mounts['models']}/")
    gpu = "nvidia.com/gpu"
    assert container["resources"]["requests"][gpu] == container["resources"]["limits"][gpu] == 1


# Arguments of `vllm serve`


def servers():
    """Where a recipe starts a server -> the arguments."""
    text = COMPOSE.read_text().replace("${MODEL:?name a folder in MODELS}", "OUT")
    yield (
        "compose",
        [
            str(part).replace("${MODEL}", "OUT")
            for part in yaml.safe_load(text)["services"]["vllm"]["command"]
        ],
    )
    (container,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    yield "kubernetes", container["args"]
    commands = PAGE.read_text().replace("\\\n", " ").splitlines()
    for number, line in enumerate(line for line in commands if line.startswith("docker run ")):
        arguments = shlex.split(line)
        yield f"page-{number}", arguments[arguments.index("vllm-qoq") + 1 :]


@pytest.fixture(scope="module")
def serve():
    """vLLM's parser of `vllm serve`."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(exit_on_error=False)
    ServeSubcommand().subparser_init(parser.add_subparsers(required=True))
    return parser


@pytest.mark.parametrize("arguments", [pytest.param(one, id=name) for name, one in servers()])
def test_vllm_takes_the_arguments_and_we_take_the_options(serve, arguments):
    from vllm_qoq.serving.options import Options

    parsed = serve.parse_args(["serve", *arguments])
    assert parsed.quantization == "qoq" and parsed.model_tag
    Options.of(SimpleNamespace(additional_config=parsed.additional_config or {}))


# Metrics

PROMETHEUS_LABELS = frozenset({"job", "instance"})


@dataclass(frozen=True)
class Exported:
    """A metric as Prometheus stores it: its type, and its labels besides those of the scrape."""

    kind: str
    labels: frozenset[str]


def series(name, kind, labels):
    """Prometheus's names of a metric -> what they are."""
    labels = frozenset(labels)
    if kind == "counter":
        return {f"{name.removesuffix('_total')}_total": Exported("counter", labels)}
    if kind == "gauge":
        return {name: Exported("gauge", labels)}
    sums = {f"{name}_{part}": Exported("counter", labels) for part in ("sum", "count")}
    return sums | {f"{name}_bucket": Exported("counter", labels | {"le"})}


def vllm_series():
    """The metrics that vLLM's logger makes, read from its source: making them needs an engine."""
    from vllm.v1.metrics import loggers

    found = {}
    for call in ast.walk(ast.parse(inspect.getsource(loggers.PrometheusStatLogger))):
        if not isinstance(call, ast.Call):
            continue
        kind = re.fullmatch(r"self\._(counter|gauge|histogram)_cls", ast.unparse(call.func))
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if kind is None or not isinstance(given["name"], ast.Constant):
            continue  # one gauge gets its name from a caller
        labels = given["labelnames"]
        own = {part.value for part in ast.walk(labels) if isinstance(part, ast.Constant)}
        if ast.unparse(labels).startswith("labelnames"):
            own |= {"model_name", "engine"}
        found |= series(given["name"].value, kind[1], own)
    return found


def our_series():
    """The metrics of our collector for one engine that has everything."""
    from vllm_qoq.serving.plugin.metrics import _RoutingCollector

    collector = _RoutingCollector()
    cache = SimpleNamespace(is_quantized=lambda: True, hadamard=True, all_bits=lambda: "4")
    collector._loggers["model", "0"] = SimpleNamespace(
        counts=lambda: {("prefill", "w8a8"): 1},
        kv_cache=cache,
        load=SimpleNamespace(is_busy=True, switches=1),
    )
    found = {}
    for family in collector.collect():
        found |= series(family.name, family.type, family.samples[0].labels)
    return found


@pytest.fixture(scope="module")
def exported():
    up = {"up": Exported("gauge", frozenset())}
    return vllm_series() | our_series() | up


def test_the_metrics_are_found(exported):
    common = {"model_name", "engine"}
    assert exported["vllm:qoq_steps_total"] == Exported("counter", common | {"phase", "set"})
    assert exported["vllm:qoq_kv_cache_info"].labels == common | {"bits", "hadamard"}
    assert exported["vllm:num_requests_running"] == Exported("gauge", common)
    assert exported["vllm:request_success_total"].labels == common | {"finished_reason"}
    assert "le" in exported["vllm:time_to_first_token_seconds_bucket"].labels


def test_the_documentation_names_our_metrics():
    page = PAGE.read_text() + DASHBOARD.read_text()
    assert [name for name in our_series() if name not in page] == []


class Query:
    """A PromQL expression, checked against the metrics that there are."""

    def __init__(self, text, exported):
        parser = pytest.importorskip("promql_parser")
        self._parser, self._exported = parser, exported
        self.labels = self._of(parser.parse(text.replace("$__rate_interval", "5m")))

    def _of(self, node, function=""):
        """The labels of an expression's result."""
        kind = type(node).__name__
        if kind == "VectorSelector":
            return self._selector(node, function)
        if kind == "MatrixSelector":
            return self._selector(node.vector_selector, function, is_range=True)
        if kind == "Call":
            labels = frozenset()
            for argument in node.args:
                labels |= self._of(argument, node.func.name)
            if node.func.name == "histogram_quantile":
                assert "le" in labels, "histogram_quantile needs le"
                labels -= {"le"}
            return labels
        if kind == "AggregateExpr":
            inner = self._of(node.expr)
            assert node.modifier is None or str(node.modifier.type).endswith("By")
            wanted = frozenset(node.modifier.labels if node.modifier else ())
            assert wanted <= inner, f"no such labels: {sorted(wanted - inner)}"
            return wanted
        if kind == "BinaryExpr":
            return self._binary(node)
        if kind == "ParenExpr":
            return self._of(node.expr, function)
        assert kind in ("NumberLiteral", "StringLiteral"), kind
        return frozenset()

    def _selector(self, node, function, is_range=False):
        metric = self._exported.get(node.name)
        assert metric is not None, f"nobody exports {node.name}"
        labels = metric.labels | PROMETHEUS_LABELS
        assert {matcher.name for matcher in node.matchers.matchers} <= labels, node.name
        counts = function in ("rate", "increase")
        assert counts == (metric.kind == "counter"), f"{node.name} is a {metric.kind}"
        assert is_range == (counts or function.endswith("_over_time")), node.name
        return labels

    def _binary(self, node):
        left, right = self._of(node.lhs), self._of(node.rhs)
        if type(node.rhs).__name__ == "NumberLiteral":
            return left
        on = node.modifier.matching if node.modifier else None
        if on is None:
            assert left == right, "sides with different labels need on()"
            return left
        assert str(on.type).endswith("Include")
        assert set(on.labels) <= left & right
        # `and` keeps the left side, and so does group_left; else `on` is what is left.
        card = str(node.modifier.card)
        keeps_left = card.endswith(("ManyToMany", "ManyToOne"))
        return left if keeps_left else frozenset(on.labels)


@pytest.mark.parametrize(
    "wrong",
    [
        "sum(rate(vllm:nothing_total[5m]))",
        "sum(vllm:qoq_steps_total)",
        "rate(vllm:qoq_busy[5m])",
        "sum by (phases) (rate(vllm:qoq_steps_total[5m]))",
        'sum(rate(vllm:qoq_steps_total{stage="decode"}[5m]))',
        "histogram_quantile(0.9, sum(rate(vllm:time_to_first_token_seconds_bucket[5m])))",
        "sum(vllm:num_requests_running) / vllm:num_requests_waiting",
    ],
)
def test_mistakes_in_queries_are_found(exported, wrong):
    pytest.importorskip("promql_parser")
    with pytest.raises(AssertionError):
        Query(wrong, exported)


def panels() -> Iterator[dict]:
    yield from json.loads(DASHBOARD.read_text())["panels"]


def test_the_queries_of_the_dashboard_use_what_is_exported(exported):
    queries = [(target, panel) for panel in panels() for target in panel.get("targets", ())]
    assert len(queries) > 20
    for target, panel in queries:
        query = Query(target["expr"], exported)
        legend = set(re.findall(r"{{\s*(\w+)\s*}}", target["legendFormat"]))
        assert legend <= query.labels, (panel["title"], target["legendFormat"])
        for label in query.labels:
            assert label in legend, f"{panel['title']}: lines that differ in {label} look alike"


def test_the_variables_of_the_dashboard_are_defined_and_used(exported):
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(?!__)(\w+)", DASHBOARD.read_text()))
    assert used == variables.keys()
    query = variables["model"]["query"]["query"]
    metric, label = re.fullmatch(r"label_values\(([\w:]+), (\w+)\)", query).groups()
    assert label in exported[metric].labels


def test_the_panels_lie_side_by_side_and_explain_themselves():
    taken, identifiers = {}, [panel["id"] for panel in panels()]
    assert len(set(identifiers)) == len(identifiers)
    for panel in panels():
        at = panel["gridPos"]
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert x < 24 and (x, y) not in taken, (panel["title"], taken.get((x, y)))
                taken[x, y] = panel["title"]
        assert panel["title"] and (panel["type"] == "row" or panel["description"].endswith("."))


def alerts():
    return [rule for group in load(ALERTS)["groups"] for rule in group["rules"]]


def test_the_alerts_use_what_is_exported(exported):
    assert load(PROMETHEUS)["rule_files"] == [ALERTS.name]
    for rule in alerts():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        query = Query(rule["expr"], exported)
        assert rule["labels"].keys() == {"severity"}
        assert rule["annotations"].keys() == {"summary", "description"}
        named = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
        assert named <= query.labels, rule["alert"]
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))


def test_the_page_lists_the_alerts_and_links_to_files_that_exist():
    page = PAGE.read_text()
    assert re.findall(r"^\| `(\w+)`", page, re.M) == [rule["alert"] for rule in alerts()]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page) if not link.startswith("#")]
    assert links and [link for link in links if not (RECIPES / link).is_file()] == []
    files = re.findall(r"(?<=[ =])docs/recipes/[\w./-]+", page)
    assert files and [name for name in files if not (ROOT / name).exists()] == []
