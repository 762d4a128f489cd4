"""Run a file of commands by one recipe of docs/machines.md, disturb some of the runs, and compare all with undisturbed ones.

    python tests/cluster/check.py xargs | ssh | slurm [--runs 8] [--epochs 8]

Every run is a small `train_synthetic.py`. Its metrics.npz must equal that of the same command run undisturbed, array by array and
bit by bit, except for `seconds` and `peak_memory`. Exit code 0: all are equal and all disturbed ones have
resumed from a checkpoint; 1: some differ, have begun again or have not ended.
    xargs   the command of one run is killed (SIGKILL), xargs stops, and the same line is started again
    ssh     GNU parallel over ssh to an sshd of its own on the loopback, two host names; two commands are killed and retried
    slurm   a cluster of this machine alone; some tasks are requeued with scontrol, some preempted by a job of a higher partition
"""

import argparse
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent.parent / "train_synthetic.py"
TIMES = ("seconds", "peak_memory")
XARGS = ["xargs", "-d", "\n", "-n", "1", "-P", "2", "sh", "-c"]


def commands(runs, epochs):
    """`runs` command lines; line i writes the folder runs/i below the current folder."""
    small = "--data mixture --seeds 2 --batch 50 --test-size 200 --importance-samples 500 --device cpu --eval-every 1"
    learn = ("fd", "swersky", "bao", "elbo")
    return [f"{sys.executable} {SCRIPT} {small} --epochs {epochs} --learn {learn[i % 4]} --seed {2 * i} --out runs/{i}"
            for i in range(1, runs + 1)]


def arrays_of(folder):
    """The arrays of the run's metrics.npz; none without a whole file."""
    try:
        with np.load(folder / "metrics.npz") as arrays:
            return dict(arrays)
    except (OSError, zipfile.BadZipFile):
        return {}


def epoch_of(folder):
    """The last epoch in the run's metrics.npz; -1 without a file."""
    return int(arrays_of(folder).get("epoch", [-1])[-1])


def ended(folder):
    return "status" in arrays_of(folder)


def differences(mine, alone):
    """Names of the arrays in which two runs differ; ["unfinished"] where one of them has no status."""
    a, b = arrays_of(mine), arrays_of(alone)
    if not ("status" in a and "status" in b):
        return ["unfinished"]
    return [name for name in sorted({*a, *b} - {*TIMES, "config"})
            if not (name in a and name in b and a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
                    and a[name].tobytes() == b[name].tobytes())]


def wait_for(condition, what, seconds=600):
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            sys.exit(f"check.py: error: waited {seconds} s for {what}")
        time.sleep(0.2)
    return value


class Events(dict):
    """What happened to each run, and the rows that it had by then."""

    def __init__(self, work):
        self.work, self.rows = work, {}

    def add(self, run, what):
        folder = self.work / f"runs/{run}"
        self.rows[run] = arrays_of(folder)["seconds"]
        self[run] = (f"{self[run]}, " if run in self else "") + f"{what} after epoch {epoch_of(folder)}"

    def resumed(self, run):
        """Its rows say when they were recorded: those from before are still there in a run that has resumed."""
        rows = self.rows[run]
        return np.array_equal(arrays_of(self.work / f"runs/{run}")["seconds"][:len(rows)], rows)


def in_mid_run(folder):
    return epoch_of(folder) >= 2 and not ended(folder)


def process_of(work, run):
    """The process of `--out runs/<run>` that runs in the folder `work`, or None."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if words[-3:] == [b"--out", b"runs/%d" % run, b""] and words[0] == sys.executable.encode() \
                    and os.path.samefile(process / "cwd", work):
                return int(process.name)
        except OSError:
            continue
    return None


def kill(work, run):
    """Send SIGKILL to the command of a run when it is in the midst of its epochs."""
    wait_for(lambda: in_mid_run(work / f"runs/{run}"), f"run {run}")
    os.kill(process_of(work, run), signal.SIGKILL)


def quiet(command, work, **kwargs):
    with open(work / "log.txt", "a") as log:
        return subprocess.Popen(command, cwd=work, stdout=log, stderr=log, **kwargs)


def xargs(work, disturbed=()):
    """Run the same line again until it ends with code 0; the runs in `disturbed` are killed once each."""
    events, todo = Events(work), list(disturbed)
    for _ in range(len(todo) + 1):
        with open(work / "commands.txt") as lines:
            process = quiet(XARGS, work, stdin=lines)
        if todo:
            run = todo.pop(0)
            kill(work, run)
            events.add(run, "killed")
        if process.wait() == 0:
            break
    return events


def ssh(work, disturbed):
    """GNU parallel over ssh; the sshd, its keys and its port are made for this call and gone after it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = work / "ssh"
    keys.mkdir(mode=0o700)
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / key], check=True)
    (keys / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {keys}/host\nAuthorizedKeysFile {keys}/user.pub\nPidFile {keys}/pid\n"
        "UsePAM no\nStrictModes no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n")
    (keys / "config").write_text(
        f"Host node1 node2\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {keys}/user\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n")
    (work / "hosts.txt").write_text("1/node1\n1/node2\n")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    server = quiet([shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin"), "-D", "-f", keys / "sshd_config"], work)
    try:
        with open(work / "commands.txt") as lines:
            process = quiet(["parallel", "--ssh", f"ssh -F {keys}/config", "--sshloginfile", "hosts.txt", "--workdir", ".",
                             "--env", "OMP_NUM_THREADS", "--retries", "3", "--joblog", "jobs.log"], work, stdin=lines)
        events = Events(work)
        for run in disturbed:
            kill(work, run)
            events.add(run, "killed")
        process.wait()
    finally:
        server.terminate()
        server.wait()
    jobs = [line.split("\t") for line in (work / "jobs.log").read_text().splitlines()[1:]]
    print(", ".join(f"{host} has ended {sum(job[1] == host for job in jobs)} runs" for host in sorted({job[1] for job in jobs})))
    return events


def slurm(work, disturbed):
    """A Slurm array; the runs in `disturbed` are requeued once each, then whatever runs is preempted once."""
    subprocess.run([HERE / "slurm.sh", "start", work / "slurm"], check=True)
    os.environ["SLURM_CONF"] = str(work / "slurm/slurm.conf")

    def output(*command):
        return subprocess.run(command, cwd=work, check=True, capture_output=True, text=True).stdout.strip()

    def running():
        return output("squeue", "--noheader", "--array", "--states=running", "--partition=low", "--format=%K").split()

    try:
        lines = (work / "commands.txt").read_text().count("\n")
        job = output("sbatch", "--parsable", f"--array=1-{lines}", HERE / "array.sbatch", "commands.txt")
        events = Events(work)
        for run in disturbed:
            wait_for(lambda run=run: str(run) in running() and in_mid_run(work / f"runs/{run}"), f"task {run}")
            output("scontrol", "requeue", f"{job}_{run}")
            events.add(run, "requeued")
        calm = {str(run) for run in range(1, lines + 1)} - set(map(str, disturbed))
        wait_for(lambda: any(in_mid_run(work / f"runs/{run}") for run in calm.intersection(running())), "a task to preempt")
        victims = running()
        output("sbatch", "--partition=high", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 1")  # preempts both slots
        for run in map(int, victims):
            if in_mid_run(work / f"runs/{run}"):  # others have not begun
                events.add(run, "preempted")
        wait_for(lambda: not output("squeue", "--noheader"), "the queue")
        restarts = re.findall(r"Restarts=([1-9])", output("scontrol", "show", "job", job))
        print(f"Slurm has restarted {len(restarts)} of {lines} tasks, {sum(map(int, restarts))} times in all")
        return events
    finally:
        subprocess.run([HERE / "slurm.sh", "stop", work / "slurm"], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=("xargs", "ssh", "slurm"), help="how the commands run")
    parser.add_argument("--runs", type=int, default=8, help="at least 6, so that some are left alone")
    parser.add_argument("--epochs", type=int, default=8, help="100 updates each")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no daemon stays
    os.environ["OMP_NUM_THREADS"] = "1"
    disturbed = {"xargs": [1], "ssh": [1, 2], "slurm": [1, 2, 4]}[args.recipe]
    lines = commands(args.runs, args.epochs)
    with tempfile.TemporaryDirectory(prefix="check", dir="/tmp") as folder:
        os.chmod(folder, 0o755)  # munged refuses a socket that others cannot reach
        alone, mine = Path(folder, "alone"), Path(folder, "mine")
        for work in (alone, mine):
            work.mkdir()
            (work / "commands.txt").write_text("".join(f"{line}\n" for line in lines))
        xargs(alone)
        if not all(ended(alone / f"runs/{run}") for run in range(1, args.runs + 1)):
            sys.exit(f"check.py: error: an undisturbed run has failed\n{(alone / 'log.txt').read_text()[-1000:]}")
        started = time.monotonic()
        events = {"xargs": xargs, "ssh": ssh, "slurm": slurm}[args.recipe](mine, [run for run in disturbed if run <= args.runs])
        seconds, equal = time.monotonic() - started, 0
        for run in range(1, args.runs + 1):
            differ = differences(mine / f"runs/{run}", alone / f"runs/{run}")
            equal += not differ
            what = f"{events[run]}, {'resumed' if events.resumed(run) else 'begun again'}" if run in events else "left alone"
            print(f"run {run}: {what}; {'differs in ' + ', '.join(differ) if differ else 'equal'}")
        resumed = sum(map(events.resumed, events))
        print(f"{args.recipe}: {args.runs} runs, {len(events)} disturbed, {resumed} resumed, {equal} equal to undisturbed ones, "
              f"{seconds:.0f} s")
    sys.exit(equal != args.runs or resumed != len(events))


if __name__ == "__main__":
    main()
