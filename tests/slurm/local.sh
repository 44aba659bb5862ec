#!/usr/bin/env bash
# A Slurm of one node on 127.0.0.1, to run real jobs on:
#   tests/slurm/local.sh start FOLDER && export SLURM_CONF=FOLDER/slurm.conf
#   tests/slurm/local.sh stop FOLDER
# Keys, state and logs are in FOLDER. Nothing else is changed, except that the packages are
# installed if they are missing and this is root. Exit status 3 means that this machine cannot
# have a Slurm; the reason is on standard error.
set -euo pipefail
PATH+=:/usr/sbin:/sbin
command=$1
mkdir -p "$2"
# Slurm's configuration has no quoting.
[[ $(realpath "$2") =~ ^[A-Za-z0-9/._-]+$ ]] || { echo "$2: no plain path" >&2; exit 3; }
home=$(realpath "$2") host=$(hostname -s)
export SLURM_CONF=$home/slurm.conf

# Print the process id of a daemon in FOLDER, unless the id belongs to another process by now.
process() {
    local pid
    pid=$(cat "$home/$1.pid" 2>&-) && grep -qsF "$home/" "/proc/$pid/cmdline" && echo "$pid"
}

free_port() {
    python3 -c 'import socket as s; a = s.create_server(("127.0.0.1", 0)); print(a.getsockname()[1])'
}

get_packages() {
    type -P sbatch slurmctld slurmd munged >/dev/null && return
    [[ $EUID == 0 ]] && type -P apt-get >/dev/null ||
        { echo "Slurm is not installed, and apt-get as root is what could install it" >&2; exit 3; }
    # The exit status of apt-get is not used; the next check decides.
    { apt-get -q update
      DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends \
          slurm-wlm munge; } </dev/null >"$home/apt.log" 2>&1 || true
    type -P sbatch slurmctld slurmd munged >/dev/null ||
        { echo "Slurm could not be installed: $(tail -n 1 "$home/apt.log")" >&2; exit 3; }
}

start() {
    # The steps of a job find each other by host name.
    [[ $(getent ahostsv4 "$(hostname)" | head -n 1) == "127.0.0.1 "* ]] ||
        { echo "$(hostname) is not 127.0.0.1 in /etc/hosts, as Slurm needs here" >&2; exit 3; }
    get_packages
    chmod 755 "$home"
    (umask 077; head -c 128 /dev/urandom >"$home/key")
    mkdir -p "$home/state" "$home/spool"
    # The node claims more cores than the machine may have, no limit is enforced, and killed
    # jobs have two seconds to end, so that jobs start and end fast.
    cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$home/munge.socket
SlurmctldPidFile=$home/slurmctld.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdPidFile=$home/slurmd.pid
SlurmdLogFile=$home/slurmd.log
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait=2
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 RealMemory=16000
PartitionName=all Nodes=ALL Default=YES DefMemPerCPU=2000 MaxTime=1-0
CONF
    munged --key-file="$home/key" --socket="$home/munge.socket" --seed-file="$home/seed" \
        --pid-file="$home/munged.pid" --log-file="$home/munged.log"
    slurmctld -c -f "$SLURM_CONF"
    slurmd -c -f "$SLURM_CONF"
    for _ in {1..150}; do
        [[ $(timeout 5 sinfo -h -o %T 2>&1) != idle ]] || return 0
        sleep 0.1
    done
    tail -n 5 "$home"/*.log >&2
    return 1
}

stop() {
    if process slurmctld >/dev/null; then
        # Jobs are cancelled first, as they would outlive the daemons.
        for _ in {1..100}; do
            jobs=$(timeout 5 squeue -h -o %A) || break
            [[ $jobs ]] || break
            timeout 5 scancel $jobs || true
            sleep 0.1
        done
    fi
    for daemon in slurmd slurmctld munged; do
        pid=$(process $daemon) || continue
        kill "$pid"
        for _ in {1..100}; do process $daemon >/dev/null || continue 2; sleep 0.1; done
        kill -KILL "$pid"
    done
}

case $command in
    start) start ;;
    stop) stop ;;
    *) echo "start or stop, not $command" >&2; exit 2 ;;
esac
