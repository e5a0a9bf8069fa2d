"""What `status` shows."""

from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from localcluster import controlplane, services
from localcluster.cluster import Cluster
from localcluster.node import RESOURCE, Node
from localcluster.processes import ClusterError

_GOOD, _BAD = "green", "red"


def _mark(good: bool, yes: str, no: str) -> Text:
    return Text(yes if good else no, style=_GOOD if good else _BAD)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table


def _items(cluster: Cluster, path: str) -> list[dict[str, Any]]:
    try:
        items: list[dict[str, Any]] = cluster.api.get(path)["items"]
    except (OSError, ClusterError):
        return []
    return items


def _ready(node: dict[str, Any]) -> Text:
    conditions = {c["type"]: c["status"] for c in node.get("status", {}).get("conditions", ())}
    return _mark(conditions.get("Ready") == "True", "Ready", "NotReady" if conditions else "–")


def _gpus(node: Node, known: dict[str, Any], pods: list[dict[str, Any]]) -> str:
    used = sum(
        int(container.get("resources", {}).get("requests", {}).get(RESOURCE, 0))
        for pod in pods
        for container in pod["spec"]["containers"]
        if pod["status"]["phase"] in {"Pending", "Running"}
    )
    capacity = known.get("status", {}).get("capacity", {}).get(RESOURCE, "0")
    failed = node.failed_gpus()
    return f"{used} of {capacity} used" + (f", failed: {', '.join(failed)}" if failed else "")


def _nodes(cluster: Cluster) -> Table:
    known = {n["metadata"]["name"]: n for n in _items(cluster, "/api/v1/nodes")}
    links, cuts = cluster.network.links(), cluster.network.cuts()
    table = _table("node", "power", "link", "state", "GPUs", "pods", "address")
    pods = _items(cluster, "/api/v1/pods")
    for node in cluster.nodes:
        mine = [p for p in pods if p["spec"].get("nodeName") == node.name]
        link = _mark(links.get(node.number, False), "up", "down")
        far = sorted({a + b - node.number for a, b in cuts if node.number in {a, b}})
        if far:
            link.append(f", none to {', '.join(f'node{i}' for i in far)}", style=_BAD)
        table.add_row(
            node.name,
            _mark(node.powered, "on", "off"),
            link,
            _ready(known.get(node.name, {})),
            _gpus(node, known.get(node.name, {}), mine),
            str(len(mine)),
            cluster.layout.node_address(node.number),
        )
    return table


def _servers(cluster: Cluster) -> Table:
    ports = cluster.ports
    urls = {
        "kube-apiserver": f"https://127.0.0.1:{ports['api']}",
        "s3": cluster.s3.endpoint_host,
        "prometheus": cluster.prometheus_url,
    }
    inside = {"s3": cluster.s3.endpoint_pods, "prometheus": cluster.prometheus_url_pods}
    table = _table("server", "state", "on this machine", "in pods")
    for name in (*controlplane.COMPONENTS, *services.COMPONENTS):
        state = _mark(cluster.processes.alive(name), "running", "stopped")
        table.add_row(name, state, urls.get(name, ""), inside.get(name, ""))
    return table


def _render(cluster: Cluster) -> RenderableType:
    if not cluster.exists:
        return Text(f"cluster {cluster.layout.name} is not up")
    title = Text(f"cluster {cluster.layout.name}, in {cluster.layout.state}", style="bold")
    return Group(title, "", _servers(cluster), "", _nodes(cluster))


def show(cluster: Cluster) -> None:
    """Print the state of servers and nodes."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140  # what reads it can scroll
    console.print(_render(cluster))
