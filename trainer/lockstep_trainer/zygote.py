"""Forks workers in milliseconds: a process that has everything imported that a worker needs.

One thread, no CUDA, no job state: only then is a fork safe. It listens on ``zygote/socket`` in the run folder and
answers one JSON object a line, each with an ``id`` of the caller's choice:

``{"op": "hello", "agent": 3}``
    First on every connection: the caller is the third agent of this pod. Requests of an earlier agent that are still
    in some buffer are refused from then on, so a new agent sees all there is. Answer: ``pid``, ``children``.
``{"op": "fork", "folder": …}``
    A worker of Lockstep's own trainer: ``lockstep_trainer.worker.main(folder)``. Answer: ``pid``.
``{"op": "exec", "folder": …, "argv": […], "env": {…}}``
    A worker of the user's own, for ``spec.command``.
``{"op": "store", "folder": …, "host": …, "port": …}``
    A rendezvous store that listens there (0 picks a free port). Answer: ``pid``, ``port``.

Whoever is connected is told of each child's end: ``{"event": "exited", "pid": …, "folder": …, "code": …, "at": …}``.
In ``folder`` a child has ``pid.json``, ``output.log`` and, at its end, ``exit.json``.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from lockstep_trainer.supervisor import OPEN_FILES_VARIABLE, SUPERVISOR_VARIABLE, die_with_parent, stat_of, write_json

_WORKER_OOM_SCORE = 800  # when memory runs out, the kernel ends workers and neither agent nor supervisor


def socket_address(directory: int) -> str:
    """Address of the socket in an open folder. Unix addresses end at 108 bytes, run folders may not."""
    return f"/proc/self/fd/{directory}/socket"


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; with the pid it names a process for good."""
    try:
        fields = stat_of(pid)
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


class Connection:
    """An agent."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream
        self.buffer = b""
        self.agent = 0

    def lines(self) -> list[bytes] | None:
        """Whole lines that have come; None at the end of the stream."""
        try:
            data = self.stream.recv(65536)
        except ConnectionError:
            return None
        if not data:
            return None
        *whole, self.buffer = (self.buffer + data).split(b"\n")
        return whole

    def send(self, message: dict[str, Any]) -> None:
        try:
            self.stream.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return  # the agent is gone; the next one asks


class Zygote:
    """The loop."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / "zygote"
        self.selector = selectors.DefaultSelector()
        self.connections: set[Connection] = set()
        self.children: dict[int, Path] = {}
        self.newest_agent = 0
        self.ending = False
        self.wake_read, self.wake_write = socket.socketpair()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def listen(self) -> None:
        """Take calls. They wait in the backlog while the imports go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        directory = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        (self.folder / "socket").unlink(missing_ok=True)
        self.listener.bind(socket_address(directory))
        os.close(directory)
        self.listener.listen(16)

    def run(self) -> None:
        """Serve until SIGTERM, then end all children."""
        self.wake_write.setblocking(False)
        signal.set_wakeup_fd(self.wake_write.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._end)
        self.selector.register(self.listener, selectors.EVENT_READ, self._accept)
        self.selector.register(self.wake_read, selectors.EVENT_READ, lambda: self.wake_read.recv(4096))
        while not self.ending:
            for key, _ in self.selector.select():
                callback: Callable[[], object] = key.data
                callback()
            self._reap()
        for pid in self.children:
            _kill_group(pid)

    def _end(self, *_: object) -> None:
        self.ending = True

    def _accept(self) -> None:
        stream, _ = self.listener.accept()
        connection = Connection(stream)
        self.connections.add(connection)
        self.selector.register(stream, selectors.EVENT_READ, lambda: self._read(connection))

    def _read(self, connection: Connection) -> None:
        lines = connection.lines()
        if lines is None:
            self.selector.unregister(connection.stream)
            connection.stream.close()
            self.connections.discard(connection)
            return
        for line in lines:
            request = json.loads(line)
            try:
                answer = self._serve(connection, request)
            except (OSError, ValueError, KeyError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            connection.send({"id": request.get("id"), **answer})

    def _serve(self, connection: Connection, request: dict[str, Any]) -> dict[str, Any]:
        if request["op"] == "hello":
            connection.agent = int(request["agent"])
            self.newest_agent = max(self.newest_agent, connection.agent)
            children = [{"pid": pid, "folder": str(folder)} for pid, folder in self.children.items()]
            return {"pid": os.getpid(), "children": children}
        if connection.agent < self.newest_agent:
            raise ValueError(f"agent {connection.agent} was followed by agent {self.newest_agent}")
        folder = Path(request["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        match request["op"]:
            case "fork":
                return {"pid": self._fork(folder, lambda: _run_worker(folder))}
            case "exec":
                return {"pid": self._fork(folder, lambda: _execute(request["argv"], request["env"]))}
            case "store":
                listener = socket.create_server((request["host"], request["port"]), backlog=1024)
                with listener:  # it listens before the fork: whoever calls early waits in the backlog
                    port = listener.getsockname()[1]
                    return {"pid": self._fork(folder, lambda: _serve_store(listener, port)), "port": port}
            case other:
                raise ValueError(f"unknown op {other!r}")

    def _fork(self, folder: Path, body: Callable[[], int]) -> int:
        (folder / "exit.json").unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            self._become_child(folder, body)
        _set_group(pid)
        write_json(folder / "pid.json", {"pid": pid, "start": start_time(pid)})
        self.children[pid] = folder
        return pid

    def _become_child(self, folder: Path, body: Callable[[], int]) -> NoReturn:
        code = 1
        try:
            _set_group(0)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self.selector.close()
            for end in (self.listener, self.wake_read, self.wake_write, *(c.stream for c in self.connections)):
                end.close()
            output = os.open(folder / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
            Path("/proc/self/oom_score_adj").write_text(str(_WORKER_OOM_SCORE))
            code = body()
        except SystemExit as end_of_worker:
            code = end_of_worker.code if isinstance(end_of_worker.code, int) else int(end_of_worker.code is not None)
            if isinstance(end_of_worker.code, str):
                print(end_of_worker.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            # Not sys.exit: destructors of process groups and of the parent's objects must not run in a child.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        """Keep each exit code before the process is gone: if we die in between, the supervisor finds a zombie."""
        while self.children:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            folder = self.children.pop(ended.si_pid, None)
            if folder is not None:
                _kill_group(ended.si_pid)  # what it has left behind, while its zombie still holds the group's number
                result = {"pid": ended.si_pid, "code": code, "at": time.time()}
                try:
                    write_json(folder / "exit.json", result)
                except OSError as error:  # an agent that is done with it has removed the folder: no cause to end all
                    print(
                        f"zygote: the end of process {ended.si_pid} is not kept: {error}", file=sys.stderr, flush=True
                    )
                for connection in self.connections:
                    connection.send({"event": "exited", "folder": str(folder), **result})
            os.waitpid(ended.si_pid, 0)


def _run_worker(folder: Path) -> int:
    from lockstep_trainer import worker

    worker.main(folder)
    return 0


def _execute(argv: list[str], env: dict[str, str]) -> int:
    environment = {**os.environ, **env}
    if given := environment.pop(OPEN_FILES_VARIABLE, None):  # select(2) knows no file beyond 1023
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(given), hard))
    try:
        os.execvpe(argv[0], argv, environment)
    except OSError as error:
        print(f"spec.command: cannot run {argv[0]!r}: {error.strerror}", file=sys.stderr)
    return 127  # as a shell does


def _serve_store(listener: socket.socket, port: int) -> int:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    while store:
        signal.pause()
    return 0


def _set_group(pid: int) -> None:
    """Give the child a process group of its own: parent and child both ask, whoever comes first."""
    try:
        os.setpgid(pid, pid)
    except OSError:
        return  # it has run another program or ended meanwhile, and has set its group itself


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _wants_torch(config_dir: str | None) -> bool:
    """True for Lockstep's own trainer, false for ``spec.command``."""
    if not config_dir:
        sys.exit("LOCKSTEP_CONFIG_DIR is not set: name the folder with the job's job.json")
    job = json.loads(Path(config_dir, "job.json").read_text())
    return job["spec"].get("trainer") is not None


def main() -> None:
    """Entry point; the supervisor starts it."""
    die_with_parent(parent=os.environ.get(SUPERVISOR_VARIABLE))
    zygote = Zygote(Path(os.environ["LOCKSTEP_RUN_DIR"]))
    zygote.listen()
    if _wants_torch(os.environ.get("LOCKSTEP_CONFIG_DIR")):
        from lockstep_trainer.preload import preload

        preload()
    tasks = len(os.listdir("/proc/self/task"))
    if tasks > 1:
        print(f"zygote: {tasks} threads after the imports; forks may inherit held locks", file=sys.stderr, flush=True)
    gc.collect()
    gc.freeze()  # a collection in a child would write to every object's page and so copy it
    zygote.run()
    os._exit(0)  # without the teardown of everything that was imported


if __name__ == "__main__":
    main()
