"""A SuperLink with SuperNodes as processes of their own on this machine, to run Flower apps on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "OMP_NUM_THREADS": "1",
}
TIMEOUT = 300
"""Seconds for a run; a run that hangs must fail some day."""


@dataclass(frozen=True)
class Network:
    """What runs.

    Attributes:
        home: Flower's own folder, with the logs of all processes.
    """

    home: Path

    def run(self, app: Path, config: Mapping[str, str | int | bool]) -> str:
        """Runs an app to its end; gives what it printed.

        Raises:
            AssertionError: It failed.
        """
        overrides = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        command = [program("flwr"), "run", str(app), "dep", "--stream", "--run-config", overrides]
        done = subprocess.run(
            command, env=environment(self.home), capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done.stdout

    def logs(self) -> str:
        """What the processes have printed."""
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(self.home.glob("*.log")))


@contextmanager
def network(home: Path, num_nodes: int) -> Iterator[Network]:
    """Starts the processes, each in a group of its own, and ends the groups: a SuperNode leaves children behind."""
    port = free_port()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "dep"\n[superlink.dep]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    link = [program("flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    with ExitStack() as stack:
        stack.enter_context(_process(link, home, "superlink"))
        _wait_until_open(port)
        for node in range(num_nodes):
            place = f"partition-id={node} num-partitions={num_nodes}"
            command = [program("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{port}"]
            command += ["--host", "127.0.0.1", "--port", str(free_port()), "--node-config", place]
            stack.enter_context(_process(command, home, f"supernode-{node}"))
        yield Network(home)


def environment(home: Path) -> dict[str, str]:
    """This process's, with Flower's own settings."""
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"  # Flower finds its other commands there
    return {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(home), "PATH": path}


@contextmanager
def local_superlink(home: Path) -> Iterator[dict[str, str]]:
    """Settings with which `flwr run` starts a SuperLink of its own, on ports that are free; it is ended afterwards."""
    ports = {"FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()), "FLWR_LOCAL_CONTROL_API_PORT": str(free_port())}
    started = {"FLWR_HOME": str(home), **ports}
    try:
        yield started
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if str(home / "local-superlink" / "superlink.log") in (process.info["cmdline"] or ()):
                os.killpg(process.pid, signal.SIGTERM)  # it leads its group
                psutil.wait_procs([process], timeout=10)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def program(name: str) -> str:
    """A command of this environment."""
    return str(Path(sys.executable).parent / name)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait_until_open(port: int) -> None:
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port}")


@contextmanager
def _process(command: list[str], home: Path, name: str) -> Iterator[None]:
    with (home / f"{name}.log").open("w") as log:
        env = environment(home)
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
