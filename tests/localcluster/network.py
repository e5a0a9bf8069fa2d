"""The cluster's network: namespaces joined by a bridge, none with a way out.

The bridge is in the control plane's namespace. A node is joined to it by a pair of virtual interfaces, and its pods'
network is reached through the node. No namespace has a default route, so nothing in the cluster reaches the host's
network, and two clusters never meet.
"""

import json
from pathlib import Path

from localcluster.paths import MAX_NODES, Layout
from localcluster.processes import in_network, run


class Network:
    """Makes, breaks, mends and removes a cluster's network."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def _in(self, namespace: str, *commands: str) -> None:
        for command in commands:
            run(*in_network(namespace, *command.split()))

    def _exists(self, namespace: str) -> bool:
        return Path("/run/netns", namespace).exists()

    def nodes(self) -> list[int]:
        """The nodes whose namespaces are there."""
        return [i for i in range(MAX_NODES) if self._exists(self.layout.namespace(i))]

    def add_control_plane(self) -> None:
        """Make the control plane's namespace and its bridge."""
        run("ip", "netns", "add", self.layout.control_plane)
        self._in(
            self.layout.control_plane,
            "ip link set lo up",
            "ip link add br0 type bridge",
            f"ip addr add {self.layout.gateway}/24 dev br0",
            "ip link set br0 up",
            "sysctl -qw net.ipv4.ip_forward=1",
        )

    def add_node(self, node: int) -> None:
        """Make a node's namespace, join it to the bridge, and tell all others where its pods are."""
        layout, others = self.layout, self.nodes()
        name, control_plane = layout.namespace(node), layout.control_plane
        run("ip", "netns", "add", name)
        joint = f"ip link add v{node} netns {control_plane} type veth peer name eth0 netns {name}"
        run(*joint.split())
        here = f"via {layout.node_address(node)}"
        self._in(control_plane, f"ip link set v{node} master br0 up", f"ip route add {layout.node_pods(node)} {here}")
        self._in(
            name,
            "ip link set lo up",
            f"ip addr add {layout.node_address(node)}/24 dev eth0",
            "ip link set eth0 up",
            "sysctl -qw net.ipv4.ip_forward=1",
            # kube-proxy rewrites packets to services, but only where a route exists are there any.
            f"ip route add {layout.services} via {layout.gateway}",
            *(f"ip route add {layout.node_pods(j)} via {layout.node_address(j)}" for j in others),
        )
        for other in others:
            self._in(layout.namespace(other), f"ip route add {layout.node_pods(node)} {here}")

    def remove(self) -> None:
        """Remove all namespaces, and the interfaces in them with them."""
        for name in (*map(self.layout.namespace, self.nodes()), self.layout.control_plane):
            if self._exists(name):
                run("ip", "netns", "del", name)

    # Failures

    def link(self, node: int, *, up: bool) -> None:
        """Plug a node's cable in or pull it."""
        self._in(self.layout.control_plane, f"ip link set v{node} {'up' if up else 'down'}")

    def links(self) -> dict[int, bool]:
        """Which nodes' cables are plugged in."""
        if not self._exists(self.layout.control_plane):
            return {}
        show = in_network(self.layout.control_plane, "ip", "-json", "link", "show", "type", "veth")
        interfaces = json.loads(run(*show))
        return {int(i["ifname"][1:]): "UP" in i["flags"] for i in interfaces}

    def cut(self, node: int, other: int) -> None:
        """Drop all packets between two nodes and their pods, in both directions."""
        layout, table = self.layout, f"inet cut-{other}"
        far = f"{{ {layout.node_address(other)}, {layout.node_pods(other)} }}"
        # Ahead of kube-proxy on the way in and behind it on the way out, where the addresses are the pods' own.
        rules = f"""
            add table {table}
            flush table {table}
            add chain {table} in {{ type filter hook prerouting priority -300; }}
            add chain {table} out {{ type filter hook postrouting priority 300; }}
            add rule {table} in ip saddr {far} drop
            add rule {table} out ip daddr {far} drop
        """
        run(*in_network(layout.namespace(node), "nft", "-f", "-"), stdin=rules)

    def cuts(self) -> list[tuple[int, int]]:
        """The pairs of nodes between which packets are dropped."""
        found = []
        for node in self.nodes():
            tables = run(*in_network(self.layout.namespace(node), "nft", "list", "tables"), check=False).split()
            found += [(node, int(t.removeprefix("cut-"))) for t in tables if t.startswith("cut-")]
        return found

    def mend(self, node: int, other: int | None = None) -> None:
        """Undo `cut` between two nodes, or between one and all others."""
        for a, b in self.cuts():
            if node in {a, b} and other in {a, b, None}:
                run(*in_network(self.layout.namespace(a), "nft", "delete", "table", "inet", f"cut-{b}"))
