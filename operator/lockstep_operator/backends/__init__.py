"""Where pods run: a Kubernetes cluster, or processes of this machine."""
