"""Names that more than one part must spell the same way: labels, conditions, reasons, ports, paths.

Every name is defined once, here, with a sentence that says what it means.
"""

from __future__ import annotations

GROUP = "lockstep.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "TrainingJob"
PLURAL = "trainingjobs"

# --- labels and annotations on pods and the job's other objects -------------------------------------------------
LABEL_JOB_NAME = f"{GROUP}/job-name"
"""Name of the TrainingJob that owns the object; the operator's cache selects on its presence."""
LABEL_JOB_UID = f"{GROUP}/job-uid"
"""Uid of the TrainingJob: a job that is deleted and created again is another job."""
LABEL_ORDINAL = f"{GROUP}/ordinal"
"""Place of the pod among ``nodes + spares``; kept by its replacements."""
LABEL_INCARNATION = f"{GROUP}/incarnation"
"""Counts the replacements of one ordinal, from 0."""
LABEL_SLOT = f"{GROUP}/slot"
"""Logical node that the pod holds (its torch node rank). Absent on a spare."""
LABEL_EPOCH = f"{GROUP}/epoch"
"""Epoch in which the slot was given."""
LABEL_ROLE = f"{GROUP}/role"
"""``member``, ``spare`` or ``starting``."""
ANNOTATION_AGENT_PORT = f"{GROUP}/agent-port"
"""Port of the agent, where it is not the default; /metrics is then one above it."""
ANNOTATION_TLS = f"{GROUP}/tls"
"""On a pod: ``on`` where its agent speaks TLS, ``off`` or absent where it does not. In a job's template ``off`` says
that it should not, for a trainer image that does not know TLS."""

LABEL_NODE_MEMORY = f"{GROUP}/node-memory"
"""On the ConfigMap that remembers the faults of nodes; the command-line tool finds it by this label."""
TAINT_EXCLUDED = f"{GROUP}/excluded"
"""Taint of a node that new pods stay away from, where the administrator allows taints; its value says who excluded
it."""

NODE_CONDITION_EXCLUDED = "LockstepExcluded"
"""Condition of such a node, where the administrator allows it: True while new pods stay away, with the reason."""

MANAGED_BY = f"{GROUP}/operator"
"""Value of ``spec.managedBy`` that this operator serves."""

# --- condition types (metav1.Condition) ------------------------------------------------------------------------
CONDITION_READY = "Ready"
"""All members hold a slot and training steps advance."""
CONDITION_SHRUNK = "Shrunk"
"""Training goes on with fewer nodes than ``spec.nodes``, since there is no room for all of them."""
CONDITION_SUSPENDED = "Suspended"
"""The job has no pods because ``spec.suspend`` is true."""
STOP_SUSPENDED = "spec.suspend is true"
"""Why a leader is told to stop: the journal's line `finished` has it as message, and a report knows it by that."""
CONDITION_CHECKPOINT_DEGRADED = "CheckpointDegraded"
"""Checkpoints can't be made durable at the moment; training goes on."""
CONDITION_SLOW_NODE = "SlowNode"
"""With ``resilience.stragglers.action: Swap``: the hardware of a member's node is slow; the reason says what is
done about it, or why nothing is."""
CONDITION_MIXED_IMAGES = "MixedImages"
"""Pods run different images of the trainer under one name, since a tag was moved while the job ran."""
CONDITION_SUCCEEDED = "Succeeded"
"""The job reached its last step and its final checkpoint is durable."""
CONDITION_FAILED = "Failed"
"""The job ended without success and won't be tried again."""

# --- the agent's contract with its pod -------------------------------------------------------------------------
AGENT_PORT = 29400
"""Default port of the agent: streams, inventory, snapshots, logs and profiles, with TLS."""
AGENT_PORT_NAME = "agent"
"""Name of that container port."""
METRICS_PORT = 29401
"""Default port of /healthz and /metrics, without TLS, and of nothing else."""
METRICS_PORT_NAME = "metrics"
"""Name of that container port; Prometheus discovers it by this name."""
STORE_PORT = 29500
"""Default port of the rendezvous store, a child of the leader's agent; MASTER_PORT of a user's script."""
CONTAINER_NAME = "trainer"
"""The container of the pod template that Lockstep runs in; others are side-cars and left alone."""
VOLUME_MOUNT = "/lockstep/run"
"""Memory-backed volume that outlives the container: agent state, worker folders, step records."""
CONFIG_MOUNT = "/lockstep/config"
"""ConfigMap with ``job.json``: the job's name, namespace, uid and its whole spec with all defaults."""
FINDINGS_FILE = "findings.yaml"
"""In the same ConfigMap: the administrator's rows of the table of findings of preflight checks, where there are any."""
TOKEN_MOUNT = "/lockstep/token"
"""Secret with ``token``, the bearer token that every call between this job's parts carries, and with their
certificate: ``tls.crt``, ``tls.key`` and ``ca.crt``."""
TOKEN_FILE = "token"
"""Key of that Secret: the job's token."""
ACCEPTED_TOKENS_FILE = "accepted-tokens"
"""Key of that Secret while the master key is changed: further tokens that are good, a line each."""
PREFLIGHT_EXIT_CODE = 90
"""Of the container `trainer` whose node failed the preflight checks; what they found is its termination message."""
TOKEN_HEADER = "X-Lockstep-Token"
"""Carries that token where a call comes through the API server's proxy, which keeps Authorization to itself."""
PROTOCOL_VERSION = 1
"""Version of the messages; N talks to N-1."""
