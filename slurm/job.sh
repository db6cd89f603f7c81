# shellcheck shell=bash
# What the scripts in this folder share. Run as a command, a script checks the run and submits itself; given to sbatch,
# or inside an allocation, it is the job: one srun step for the trainer's ranks and one for the rollout servers.
#
#   rlad_job RECIPE [key=value ...]     options that begin with -- go to sbatch (only when submitting)

readonly RLAD_MODULE=rlad_megatron.launch.slurm
readonly RLAD_END_S=20       # for the other tasks to end by themselves, once one has ended
readonly RLAD_USER_ERROR=2   # exit code for what the user can mend

rlad_job() {
    local site=${RLAD_SITE:-slurm/site.sh}
    [[ -f $site ]] || rlad_die "$site: no such file; submit from the folder of the repository, or set RLAD_SITE"
    # shellcheck source=slurm/site.sh
    source "$site"
    if [[ ${RLAD_CONTAINER_IMAGE:-} == [./]* && ! -e $RLAD_CONTAINER_IMAGE ]]; then
        rlad_die "RLAD_CONTAINER_IMAGE=$RLAD_CONTAINER_IMAGE ($site): no such file; build it (docs/operations.md) or mend the path"
    fi
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        rlad_run "$@"
    else
        rlad_submit "$@"
    fi
}

rlad_die() {
    echo "rlad: $*" >&2
    exit "$RLAD_USER_ERROR"
}

rlad_submit() {
    local options=() overrides=() word
    for word in "${@:2}"; do
        if [[ $word == -* ]]; then options+=("$word"); else overrides+=("$word"); fi
    done
    command -v sbatch >/dev/null ||
        rlad_die "no Slurm on this machine (sbatch not found); submit from a login node, or use \`rlad train\` here"
    if [[ -n ${RLAD_LOGIN_PYTHON:-} ]]; then
        "$RLAD_LOGIN_PYTHON" -m "$RLAD_MODULE" check "$0" "${options[@]}" "$1" "${overrides[@]}" || exit
    fi
    exec sbatch "${options[@]}" "$0" "${overrides[@]}"
}

# A step of the job, in the container if there is one. All steps may use whatever the job has: --overlap.
rlad_srun() {
    local flags=(--overlap --mem=0 --cpu-bind=none)
    if [[ -n ${RLAD_CONTAINER_IMAGE:-} ]]; then
        flags+=(--container-image="$RLAD_CONTAINER_IMAGE" --container-workdir="$PWD")
        flags+=(--container-mounts="$PWD:$PWD${RLAD_CONTAINER_MOUNTS:+,$RLAD_CONTAINER_MOUNTS}")
    fi
    exec srun "${flags[@]}" "$@"
}

rlad_running() { # PID: whether that child still runs
    [[ -n $1 ]] && kill -0 "$1" 2>/dev/null
}

# Waits until one of two children has ended. Signals are handled meanwhile.
rlad_wait_for_first() {
    while rlad_running "$1" && { [[ -z $2 ]] || rlad_running "$2"; }; do
        sleep 0.5 &
        wait $! || true
    done
}

rlad_end_steps() { # the job's steps; the pids of their srun follow
    scancel --quiet --signal=TERM "$SLURM_JOB_ID" || true
    local deadline=$((SECONDS + RLAD_END_S)) pid
    for pid in "$@"; do
        while rlad_running "$pid" && ((SECONDS < deadline)); do sleep 0.2; done
    done
    for pid in "$@"; do
        if rlad_running "$pid"; then
            scancel --quiet --signal=KILL "$SLURM_JOB_ID" || true
            kill -KILL "$pid" 2>/dev/null || true
        fi
    done
}

# Says which task failed first, and the last thing that it said: "rlad: ..." if it was an error of ours.
rlad_report() { # FOLDER STEP STATUS
    local first="" log said
    cat "$1/srun_$2.err" >&2
    first=$(grep -m1 -oE '[^ ]+: tasks? [0-9].*' "$1/srun_$2.err") || true
    log="$1/$2_$(grep -m1 -oE '[0-9]+' <<<"${first#*task}" || echo 0).log"
    said=$(grep -a '^rlad: ' "$log" 2>/dev/null | tail -n 1) || true
    [[ -n $said ]] || said=$(grep -a '[^[:space:]]' "$log" 2>/dev/null | tail -n 1) || true
    echo "rlad: the $2 step failed first (${first:-srun ended with code $3}); log $log: ${said#rlad: }" >&2
}

rlad_run() {
    local recipe=$1 trainer servers="" status=0 failed=trainer line
    local command=("$RLAD_PYTHON" -m "$RLAD_MODULE")
    local arguments=("${@:2}")
    # A job that Slurm has started before goes on where it was; without a checkpoint it begins anew.
    ((${SLURM_RESTART_COUNT:-0} == 0)) || arguments+=(resume=true)

    line=$(rlad_srun --nodes=1 --ntasks=1 "${command[@]}" place "$recipe" "${arguments[@]}") || exit
    local nodes ranks_each first server_nodes servers_each num_servers folder
    read -r nodes ranks_each first server_nodes servers_each num_servers folder <<<"$line"
    echo "tasks write to $folder; progress: tail -f $folder/trainer_0.log"

    rlad_srun --nodes="$nodes" --relative=0 --ntasks=$((nodes * ranks_each)) --ntasks-per-node="$ranks_each" \
        --distribution=block --kill-on-bad-exit=1 --job-name=trainer --output="$folder/trainer_%t.log" \
        "${command[@]}" train "$recipe" "${arguments[@]}" 2>"$folder/srun_trainer.err" &
    trainer=$!
    if ((num_servers > 0)); then
        rlad_srun --nodes="$server_nodes" --relative="$first" --ntasks="$num_servers" \
            --ntasks-per-node="$servers_each" --distribution=block --kill-on-bad-exit=1 --job-name=server \
            --output="$folder/server_%t.log" \
            "${command[@]}" serve "$recipe" "${arguments[@]}" 2>"$folder/srun_server.err" &
        servers=$!
    fi
    # Sent by Slurm before the time limit: the trainer saves after its step and leaves.
    trap 'kill -USR1 "$trainer" 2>/dev/null || true' USR1
    trap 'rlad_end_steps "$trainer" $servers; exit 143' TERM

    rlad_wait_for_first "$trainer" "$servers"
    if rlad_running "$trainer"; then failed=server; fi
    if [[ $failed == trainer ]]; then wait "$trainer" || status=$?; else wait "$servers" || status=$?; fi
    # shellcheck disable=SC2086 # no server: no argument
    rlad_end_steps "$trainer" $servers
    wait || true

    if [[ $failed == trainer && $status == 0 && -e $folder/requeue ]]; then
        echo "stopped before the time limit; requeueing"
        scontrol requeue "$SLURM_JOB_ID"
        exit
    fi
    if [[ $failed == server || $status != 0 ]]; then
        rlad_report "$folder" "$failed" "$status"
        exit $((status > 0 ? status : 1))
    fi
    grep -aE '^(report|student): ' "$folder/trainer_0.log" || true
}
