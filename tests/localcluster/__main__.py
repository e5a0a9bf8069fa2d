"""The command line: `python -m localcluster --help`."""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from localcluster import images
from localcluster.cluster import Cluster
from localcluster.processes import ClusterError

EPILOG = """
one cluster to a checkout; another one beside it: LOCKSTEP_CLUSTER_NAME=other python -m localcluster up
a shell for it:  eval "$(python -m localcluster env)"
"""

Command = Callable[[Cluster, argparse.Namespace], None]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _up(cluster: Cluster, arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    cluster = Cluster.up(arguments.nodes, arguments.gpus, cluster.layout.name)
    seconds = time.monotonic() - started
    _say(f"cluster {cluster.layout.name} is up with {cluster.record['nodes']} nodes ({seconds:.1f} s)")
    _say('now: eval "$(python -m localcluster env)"')


def _down(cluster: Cluster, arguments: argparse.Namespace) -> None:
    cluster.down(purge=arguments.purge)
    _say(f"cluster {cluster.layout.name} is down")


def _status(cluster: Cluster, _: argparse.Namespace) -> None:
    from localcluster.status import show

    show(cluster)


def _build(_: Cluster, arguments: argparse.Namespace) -> None:
    from localcluster import build

    build.build(arguments.module, keep_cache=arguments.keep_cache)
    for program, path in build.programs().items():
        print(f"{program:24} {path}")


def _env(cluster: Cluster, _: argparse.Namespace) -> None:
    for name, value in cluster.environment.items():
        print(f"export {name}={shlex.quote(value)}")


def _logs(cluster: Cluster, arguments: argparse.Namespace) -> None:
    if not arguments.name:
        print("\n".join(sorted(f.stem for f in cluster.layout.logs.glob("*.log"))))
        return
    log = cluster.processes.log(arguments.name)
    if not log.exists():
        raise ClusterError(f"no log {log}")
    tail = ["tail", "-n", str(arguments.lines), *(["-F"] if arguments.follow else []), str(log)]
    os.execvp("tail", tail)


def _kubectl(cluster: Cluster, arguments: argparse.Namespace) -> None:
    given = arguments.arguments[1:] if arguments.arguments[:1] == ["--"] else arguments.arguments
    env = {**os.environ, **cluster.environment}
    raise SystemExit(subprocess.run([cluster.layout.programs / "kubectl", *given], env=env, check=False).returncode)


def _image_load(cluster: Cluster, arguments: argparse.Namespace) -> None:
    cluster.load_image(*arguments.file)


def _image_build(_: Cluster, arguments: argparse.Namespace) -> None:
    print(images.build_image(arguments.dockerfile, arguments.tag))


def _node_argument(parser: argparse.ArgumentParser, name: str = "node") -> None:
    parser.add_argument(name, type=lambda text: int(text.removeprefix("node")), help="number of a node: 0, 1, …")


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    main = argparse.ArgumentParser(
        "localcluster",
        description="A real Kubernetes cluster on this machine, whose nodes can fail.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, does: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(does=does)
        return sub

    up = command("up", _up, "build what is missing, then bring the cluster up; add nodes to a running one")
    up.add_argument("--nodes", type=int, default=3, help="0 for the control plane alone (default: 3)")
    up.add_argument("--gpus", type=int, default=2, help="pretended GPUs of each node (default: 2)")
    down = command("down", _down, "end everything, also after a crash")
    down.add_argument("--purge", action="store_true", help="delete the logs and the whole state folder as well")
    command("status", _status, "show servers and nodes")
    logs = command("logs", _logs, "show a program's log, or the names of all logs")
    logs.add_argument("name", nargs="?", help="for example kube-apiserver or node0-kubelet")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it grows")
    logs.add_argument("-n", "--lines", type=int, default=50, help="how many lines (default: 50)")
    command("env", _env, "print the variables for a shell: KUBECONFIG, PATH, AWS_…")
    kubectl = command("kubectl", _kubectl, "run kubectl as administrator")
    kubectl.add_argument("arguments", nargs=argparse.REMAINDER, help="after --")
    image = command("image-build", _image_build, "build an image, unless nothing it is made of has changed")
    image.add_argument("dockerfile", type=Path)
    image.add_argument("tag", help="for example lockstep-trainer:dev")
    load = command("image-load", _image_load, "give images to all nodes")
    load.add_argument("file", nargs="+", type=Path, help="a docker-archive, or what images.build_image returned")

    cut = command("power-cut", lambda c, a: c.power_cut(a.node), "cut a node's power without warning")
    on = command("power-on", lambda c, a: c.power_on(a.node), "switch a node on again")
    partition = command("partition", lambda c, a: c.partition(a.node, a.other), "pull a node's cable")
    heal = command("heal", lambda c, a: c.heal(a.node, a.other), "undo partition")
    fail = command("gpu-fail", lambda c, a: c.gpu_fail(a.node, a.device), "make a GPU unhealthy")
    well = command("gpu-heal", lambda c, a: c.gpu_heal(a.node, a.device), "make a GPU, or all of the node's, healthy")
    for sub in (cut, on, partition, heal, fail, well):
        _node_argument(sub)
    for sub in (partition, heal):
        sub.add_argument("other", nargs="?", type=int, help="only between the two nodes")
    fail.add_argument("device", help="its number or name")
    well.add_argument("device", nargs="?", help="its number or name")
    command("s3-stop", lambda c, _: c.s3_stop(), "kill the S3 server; its data stays")
    command("s3-start", lambda c, _: c.s3_start(), "start the S3 server again")
    command("apiserver-restart", lambda c, _: c.apiserver_restart(), "kill the API server and start it again")
    build = command("build", _build, "build the programs that are missing, and say where all of them are")
    build.add_argument("module", nargs="*", help="only these: etcd, kubernetes, helm, …")
    build.add_argument("--keep-cache", action="store_true", help="keep Go's build cache (gigabytes)")
    return main


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command."""
    arguments = parser().parse_args(argv)
    try:
        arguments.does(Cluster(), arguments)
    except ClusterError as problem:
        raise SystemExit(f"localcluster: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stderr.close()


if __name__ == "__main__":
    main()
