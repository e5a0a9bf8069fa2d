"""A real Kubernetes cluster on this machine."""

from localcluster.cluster import Cluster
from localcluster.processes import ClusterError

__all__ = ["Cluster", "ClusterError"]
