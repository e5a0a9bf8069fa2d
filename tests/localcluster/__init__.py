"""A real Kubernetes cluster on this machine."""
