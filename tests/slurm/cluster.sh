#!/usr/bin/env bash
# A real Slurm cluster on this machine for the tests: munged, slurmctld and two slurmd nodes from Debian's packages.
#
#   tests/slurm/cluster.sh up DIR       start it; its files are in DIR (slurm.conf: export SLURM_CONF=DIR/slurm.conf)
#   tests/slurm/cluster.sh down DIR     stop it, with all its processes and network devices
#
# Each node has separate namespaces: network (veth to a bridge), host name, processes, and mounts with a private /dev/shm
# and /etc/hosts. So nodes share only files, as hosts of a cluster do. Needs root.
set -euo pipefail

readonly NODES=(rlad1 rlad2)
readonly NET=198.18.77 # in the range for benchmarks (RFC 2544), which no real network uses
readonly BRIDGE=rladbr
readonly CONTROLLER=rlad0 # this machine, as the nodes see it

address() { # of the i-th node, counted from 0
    echo "$NET.$(($1 + 1))"
}

die() {
    echo "cluster.sh: $*" >&2
    exit 1
}

write_files() {
    mkdir -p "$DIR"/{state,log}
    # munged refuses a key that others can read and a folder that others can write.
    chmod 755 "$DIR"
    dd if=/dev/urandom of="$DIR/munge.key" bs=128 count=1 status=none
    chmod 400 "$DIR/munge.key"
    {
        echo "127.0.0.1 localhost"
        echo "$NET.254 $CONTROLLER"
        for i in "${!NODES[@]}"; do echo "$(address "$i") ${NODES[i]}"; done
    } >"$DIR/hosts"
    cat >"$DIR/slurm.conf" <<CONF
ClusterName=rlad
SlurmctldHost=$(hostname -s)($NET.254)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
AuthType=auth/munge
# A requeued job also waits for cred_expire before it starts again.
AuthInfo=socket=$DIR/munge.socket,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/state/%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/state/%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
MinJobAge=3600
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
PlugStackConfig=/dev/null
# More cores than the machine has: the jobs are small, and tests run at the same time.
GresTypes=gpu
NodeName=rlad1 NodeAddr=$(address 0) CPUs=16 State=UNKNOWN
NodeName=rlad2 NodeAddr=$(address 1) CPUs=16 State=UNKNOWN
PartitionName=test Nodes=rlad1,rlad2 Default=YES MaxTime=INFINITE State=UP
# Cloud nodes that never start: only for sbatch --test-only of a job of 64 GPUs.
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=600
NodeName=gpu[1-8] CPUs=128 Gres=gpu:8 State=CLOUD
PartitionName=gpu Nodes=gpu[1-8] MaxTime=INFINITE State=UP
CONF
    echo "CgroupPlugin=cgroup/v1" >"$DIR/cgroup.conf"
    : >"$DIR/gres.conf"
}

start_network() {
    ip link add "$BRIDGE" type bridge
    ip addr add "$NET.254/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
    for i in "${!NODES[@]}"; do
        local node=${NODES[i]}
        ip netns add "$node"
        ip link add "v$node" type veth peer name eth0 netns "$node"
        ip link set "v$node" master "$BRIDGE" up
        ip -n "$node" addr add "$(address "$i")/24" dev eth0
        ip -n "$node" link set eth0 up
        ip -n "$node" link set lo up
    done
}

start_node() {
    local node=$1
    # The first process reaps the node's orphans; when it is killed, the kernel kills the rest.
    # shellcheck disable=SC2016 # expanded by the inner shell
    nsenter --net="/run/netns/$node" unshare --uts --pid --fork --kill-child --mount --mount-proc --propagation private \
        bash -c '
            hostname "$1"
            mount --bind "$2/hosts" /etc/hosts
            mount -t tmpfs tmpfs /dev/shm
            SLURM_CONF="$2/slurm.conf" slurmd -D -N "$1" &
            wait
        ' node "$node" "$DIR" </dev/null >"$DIR/log/$node.out" 2>&1 &
    echo $! >"$DIR/$node.node.pid"
}

up() {
    [[ $(id -u) == 0 ]] || die "needs root"
    for program in munged slurmctld slurmd sbatch ip nsenter unshare; do
        command -v "$program" >/dev/null || die "$program is not installed (make slurm-deps)"
    done
    down
    write_files
    start_network
    munged --force --socket="$DIR/munge.socket" --key-file="$DIR/munge.key" --pid-file="$DIR/munged.pid" \
        --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge.seed"
    export SLURM_CONF="$DIR/slurm.conf"
    slurmctld -c
    for node in "${NODES[@]}"; do start_node "$node"; done
    for _ in $(seq 750); do
        [[ $(sinfo --noheader --states=idle --format=%D 2>/dev/null | tr -d ' ') == "${#NODES[@]}" ]] && return
        sleep 0.2
    done
    tail -n 20 "$DIR"/log/*.log >&2
    sinfo --long --Node >&2 || true
    die "the nodes ${NODES[*]} did not become idle within 150 s"
}

node_has_processes() {
    [[ -e /run/netns/$1 && -n $(ip netns pids "$1") ]]
}

# A killed process may still write for a moment to what is removed here.
until_gone() { # COMMAND that succeeds while the thing exists
    for _ in $(seq 100); do
        "$@" || return 0
        sleep 0.1
    done
}

down() {
    local file node
    for file in "$DIR"/{slurmctld,munged,rlad1.node,rlad2.node}.pid; do
        [[ -s $file ]] || continue
        kill -KILL "$(<"$file")" 2>/dev/null || true
        until_gone test -e "/proc/$(<"$file")/exe"
    done
    for node in "${NODES[@]}"; do
        until_gone node_has_processes "$node"
        ip link del "v$node" 2>/dev/null || true
        if [[ -e /run/netns/$node ]]; then ip netns del "$node"; fi
    done
    ip link del "$BRIDGE" 2>/dev/null || true
    rm -rf "${DIR:?}"/{state,munge.*,*.pid}
}

[[ $# == 2 && ($1 == up || $1 == down) ]] || die "usage: cluster.sh up|down DIR"
DIR=$(realpath -m "$2")
readonly DIR
"$1"
