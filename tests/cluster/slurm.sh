#!/usr/bin/env bash
# A Slurm cluster of this machine alone, as the calling user: munged, slurmctld and slurmd, without systemd, all in one folder.
#     tests/cluster/slurm.sh start FOLDER      then: export SLURM_CONF=FOLDER/slurm.conf
#     tests/cluster/slurm.sh stop FOLDER
# Needs Debian's slurm-wlm and munge, and a folder whose path is short (a socket's name has at most 107 characters).
# Partition `low` is preempted by partition `high`. CPUS is the number of slots, 2 unless set.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

start() {
    mkdir -p "$1"
    chmod 755 "$1"
    cd "$1"
    dir=$PWD user=$(id -un) host=$(hostname -s)
    read -r controller_port node_port < <(python3 - <<'PY'
import socket
free = [socket.socket() for _ in range(2)]
for s in free:
    s.bind(("", 0))
print(*(s.getsockname()[1] for s in free))
PY
    )
    mkdir -p state spool munge
    chmod 700 munge
    (umask 077 && head -c 1024 /dev/urandom >munge/key)
    cat >slurm.conf <<CONF
ClusterName=check
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A requeued job waits until the credential of its first start has expired: 5 s here, 120 s where nothing is said.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
# Neither cgroups nor CPU affinity: containers have neither.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=10
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$host NodeAddr=127.0.0.1 CPUs=${CPUS:-2}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 State=UP
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP
CONF
    munged --key-file="$dir/munge/key" --socket="$dir/munge.socket" --pid-file="$dir/munge/pid" --seed-file="$dir/munge/seed" \
        --log-file="$dir/munge/log" --num-threads=2
    export SLURM_CONF=$dir/slurm.conf
    slurmctld
    slurmd
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --partition=low --format=%T 2>/dev/null)" = idle ] && exit 0
        sleep 0.5
    done
    tail -n 5 slurmctld.log slurmd.log >&2
    exit 1
}

stop() {
    cd "$1"
    export SLURM_CONF=$PWD/slurm.conf
    scancel --user="$(id -un)" 2>/dev/null || true  # a job would outlive the daemons
    for _ in $(seq 30); do
        [ -n "$(squeue --noheader 2>/dev/null)" ] || break
        sleep 0.5
    done
    for pid in slurmd.pid slurmctld.pid munge/pid; do
        [ -s "$pid" ] || continue
        process=$(cat "$pid")
        kill "$process" 2>/dev/null || true
        for _ in $(seq 40); do
            kill -0 "$process" 2>/dev/null || break
            sleep 0.25
        done
    done
}

"$1" "$2"
