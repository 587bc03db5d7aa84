"""Runs a real Slurm of two nodes on this machine as an ordinary user: munged, slurmctld and two slurmd on loopback."""

import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from ports import free_port

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")

# All nodes are this machine, so they share its name and address and differ by their ports. GPUs must be character
# devices for Slurm to hand them out; nothing opens these.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
JobRequeue=1
KillWait=5
InactiveLimit=0
SlurmdTimeout=30
MessageTimeout=30
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    paths = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=paths) is None]


def until(what: str, found: Callable[[], Any], seconds: float, told: Callable[[], str] = lambda: "") -> Any:
    """Return the first true value of `found`. Fail after so many seconds, and say what is waited for."""
    started = said = time.monotonic()
    while not (value := found()):
        now = time.monotonic()
        assert now - started < seconds, f"still waiting for {what} after {seconds:g} s\n{told()}"
        if now - said > 10:
            said = now
            print(f"waiting for {what} for {now - started:.0f} s")
        time.sleep(0.2)
    return value


class Cluster:
    """Owns the daemons of the cluster. `close()` ends the jobs and them, and so does any end of this process.

    folder: everybody's in it; the jobs' user may write there.
    """

    def __init__(self) -> None:
        account, self._as_user = _ordinary_user()
        self.folder = Path(tempfile.mkdtemp(prefix="megatron_rl-slurm-"))
        self.folder.chmod(0o755)
        os.chown(self.folder, account.pw_uid, account.pw_gid)
        self._environment = os.environ | {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "HOME": str(self.folder),
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._configure(account.pw_name)
            self._start("munged", "--foreground", "--force", *self._munge_options())
            until("munged", (self.folder / "munge.socket").exists, 300)
            self._start("slurmctld", "-D", "-i")
            for node in NODES:
                self.start_node(node)
            self.wait_idle()
        except BaseException:
            self.close()
            raise

    def start_node(self, name: str) -> None:
        self._start(f"slurmd_{name}", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """Kill the slurmd of a node, as if its machine died. On a real machine its processes would die too."""
        daemon = self._daemons.pop(f"slurmd_{name}")
        daemon.kill()
        daemon.wait()

    def wait_idle(self) -> None:
        until("two idle nodes", lambda: self._states() == ["idle"] * len(NODES), 600, lambda: self.run("sinfo", "-Nl"))

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """Run a client command and return its stdout and stderr together."""
        done = subprocess.run(
            command,
            env=self._environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=300,
            cwd=environment.get("PWD"),
            **self._as_user,
        )
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`. `sbatch --wait` would look for the end less and less often."""
        text = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def close(self) -> None:
        if "slurmctld" in self._daemons:
            self.run("scancel", "--user", str(self._as_user.get("user", os.getuid())), check=False)
            until("jobs to end", lambda: not self.run("squeue", "--noheader", check=False).strip(), 300)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(60)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _configure(self, user: str) -> None:
        host = socket.gethostname().split(".")[0]
        ports = [free_port() for _ in range(1 + len(NODES))]
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000 Gres=gpu:2"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        text = CONFIGURATION.format(
            host=host, controller_port=ports[0], user=user, folder=self.folder, nodes="\n".join(nodes)
        )
        (self.folder / "slurm.conf").write_text(text)
        gpus = [f"NodeName={name} Name=gpu File=/dev/null,/dev/zero\n" for name in NODES]
        (self.folder / "gres.conf").write_text("".join(gpus))
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        if self._as_user:
            os.chown(key, self._as_user["user"], self._as_user["group"])

    def _munge_options(self) -> list[str]:
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munge.seed"}
        return [f"--{option}={self.folder / name}" for option, name in files.items()]

    def _start(self, name: str, *options: str) -> None:
        command = ["setpriv", "--pdeathsig", "TERM", name.split("_")[0], *options]
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._as_user
            )

    def _states(self) -> list[str]:
        return self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()


def _ordinary_user() -> tuple[pwd.struct_passwd, dict[str, Any]]:
    """Return the user that owns daemons and jobs, and the options of Popen that start a process as that user.

    It is the user who runs the tests. For root it is `nobody`, since root may do anything; but root itself if `nobody`
    may not read this interpreter or these tests (in root's home, for example).
    """
    if os.getuid() != 0:
        return pwd.getpwuid(os.getuid()), {}
    nobody = pwd.getpwnam("nobody")
    options: dict[str, Any] = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    try:
        subprocess.run([sys.executable, "-c", f"open({__file__!r})"], check=True, capture_output=True, **options)
    except (OSError, subprocess.CalledProcessError):
        print("nobody may not run this interpreter: Slurm runs as root")
        return pwd.getpwuid(0), {}
    return nobody, options
