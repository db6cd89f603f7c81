# shellcheck shell=bash
# Shared by the scripts in this folder. Run as a command, a script checks the run, freezes its configuration and submits
# itself. Given to sbatch, or run inside an allocation, it is the job: an srun step for the trainer's ranks, one for a
# dedicated teacher's, and one for the rollout servers.
#
#   rlad_job RECIPE [key=value ...] -- "$@"
#
# What follows -- is the user's: key=value, and options that begin with a dash, which go to sbatch. A job gets its
# frozen configuration (runs/.submitted/NAME-TIME-ID.yaml) there too. After plain sbatch there is none, and the job
# freezes it when it starts first (runs/.submitted/job_ID.yaml).

# shellcheck source=rlad_megatron/launch/signals.sh
source rlad_megatron/launch/signals.sh

readonly RLAD_MODULE=rlad_megatron.launch.slurm
readonly RLAD_END_S=20     # for the other tasks to end by themselves, once one has ended
readonly RLAD_USER_ERROR=2 # exit code for what the user can fix

# Slurm sends SIGUSR1 before the time limit (#SBATCH --signal), with a short limit immediately. Its default action would
# end this script.
rlad_told=""
trap 'rlad_told=1' USR1

rlad_job() {
    local site=${RLAD_SITE:-slurm/site.sh} word
    for word in "$@"; do
        if [[ $word == -h || $word == --help ]]; then rlad_help "$@"; fi
    done
    [[ -f $site ]] || rlad_die "$site: no such file; submit from the folder of the repository, or set RLAD_SITE"
    # shellcheck source=slurm/site.sh
    source "$site"
    rlad_check_site "$site" "${RLAD_CONTAINER_IMAGE:-}"
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        rlad_run "$@"
    else
        rlad_submit "$@"
    fi
}

rlad_check_site() { # FILE IMAGE
    [[ -n ${RLAD_PYTHON:-} ]] || rlad_die "RLAD_PYTHON is not set ($1); set it to the Python of the tasks"
    if [[ $2 == *.sqsh && $2 != [./]* ]]; then
        rlad_die "RLAD_CONTAINER_IMAGE=$2 ($1): pyxis takes that for an image of a registry; write ./$2"
    elif [[ $2 == [./]* && ! -f $2 ]]; then
        rlad_die "RLAD_CONTAINER_IMAGE=$2 ($1): no such file; build it (docs/operations.md) or fix the path"
    fi
    [[ $RLAD_PYTHON == */* && $RLAD_PYTHON != /* ]] || return 0
    if [[ -n $2 ]]; then
        rlad_die "RLAD_PYTHON=$RLAD_PYTHON ($1) is a file of the host; with RLAD_CONTAINER_IMAGE give the container's" \
            "Python (/opt/rlad/bin/python in the Dockerfile's)"
    elif [[ ! -x $RLAD_PYTHON ]]; then
        rlad_die "RLAD_PYTHON=$RLAD_PYTHON ($1): no such program in this folder; make the environment" \
            "(docs/operations.md) or fix the path"
    fi
}

rlad_die() {
    echo "rlad: $*" >&2
    exit "$RLAD_USER_ERROR"
}

# The script's first comment, and what may follow its name.
rlad_help() { # RECIPE [key=value ...] -- ...
    local line recipe=$1 own=""
    while read -r line && [[ $line == "#"* && $line != "#SBATCH"* ]]; do
        if [[ $line != "#!"* ]]; then line=${line#"#"} && echo "${line# }"; fi
    done <"$0"
    shift
    while [[ $1 != -- ]]; do own+=" $1" && shift; done
    cat <<END
recipe: $recipe$own
  key=value      changes a field of the recipe; \`rlad show $recipe\` lists them
                 name=NAME is the run's folder in runs/, resume=true continues the run of that name
  --option=...   goes to sbatch and overrides the script's #SBATCH lines; one word, for example --partition=gpu
The configuration is frozen when you submit: later edits of the recipe change neither the job nor its requeues.
site file: ${RLAD_SITE:-slurm/site.sh} (RLAD_SITE names another): partition, account, container, Python of the nodes
more: docs/operations.md
END
    exit 0
}

rlad_submit() {
    local recipe=$1 own=() options=() overrides=() word said config=()
    shift
    while [[ $1 != -- ]]; do
        own+=("$1")
        shift
    done
    for word in "${@:2}"; do
        case $word in
            -*) options+=("$word") ;;
            *=*) overrides+=("$word") ;;
            *) rlad_die "'$word' is not key=value; an option for sbatch is one word, for example --partition=gpu" ;;
        esac
    done
    command -v sbatch >/dev/null ||
        rlad_die "no Slurm on this machine (sbatch not found); submit from a login node, or use \`rlad train\` here"
    if [[ -n ${RLAD_LOGIN_PYTHON:-} ]]; then
        command -v "$RLAD_LOGIN_PYTHON" >/dev/null ||
            rlad_die "RLAD_LOGIN_PYTHON=$RLAD_LOGIN_PYTHON (site file): no such program; make setup, or leave it empty"
        said=$("$RLAD_LOGIN_PYTHON" -m "$RLAD_MODULE" submit "$0" "${options[@]}" "$recipe" "${own[@]}" "${overrides[@]}" 2>&1) ||
            rlad_refuse $? "$said"
        config=("${said##*$'\n'}") # the last line; warnings come before it
        if [[ ${config[0]} != runs/.submitted/* ]]; then echo "$said" >&2 && exit 0; fi # the run is complete
        said=${said%"${config[0]}"}
        if [[ -n $said ]]; then echo "${said%$'\n'}" >&2; fi
    fi
    sbatch "${options[@]}" "$0" "${config[@]}" "${overrides[@]}" || { word=$? && rm -f "${config[@]}" && exit "$word"; }
}

# The check on the login node failed. Print its message, unless that Python cannot run the check.
rlad_refuse() { # STATUS TEXT
    local needs='import sys; assert sys.version_info >= (3, 11), sys.version.split()[0]; import pydantic, yaml' lacks
    if (($1 != RLAD_USER_ERROR)) && ! lacks=$("$RLAD_LOGIN_PYTHON" -c "$needs" 2>&1); then
        rlad_die "RLAD_LOGIN_PYTHON=$RLAD_LOGIN_PYTHON (site file) cannot check the run (${lacks##*$'\n'}); name a Python" \
            "3.11 or newer with pydantic and PyYAML (make setup), or leave it empty: then the job makes the check"
    fi
    echo "$2" >&2
    exit "$1"
}

# A step of the job, in the container if there is one. Each step may use all resources of the job: --overlap.
rlad_srun() {
    local site flags=(--overlap --mem=0)
    read -ra site <<<"${RLAD_SRUN_FLAGS:-}"
    flags+=("${site[@]}")
    if [[ -n ${RLAD_CONTAINER_IMAGE:-} ]]; then
        # Writable: vLLM and Triton keep caches in the home folder, which may be the container's.
        flags+=(--container-image="$RLAD_CONTAINER_IMAGE" --container-workdir="$PWD" --container-writable)
        flags+=(--container-mounts="$PWD:$PWD${RLAD_CONTAINER_MOUNTS:+,$RLAD_CONTAINER_MOUNTS}")
    fi
    exec srun "${flags[@]}" "$@"
}

rlad_running() { # PID: whether that child still runs
    [[ -n $1 ]] && kill -0 "$1" 2>/dev/null
}

# Waits until a step has ended or there is an error. The short sleeps let signals be handled.
rlad_wait_for_first() { # PID...
    local pid
    while [[ ! -e $rlad_folder/failed ]]; do
        for pid in "$@"; do rlad_running "$pid" || return 0; done
        sleep 0.5 &
        wait $! || true
    done
}

rlad_end_steps() { # PID... of the steps' sruns
    scancel --quiet --signal=TERM "$(rlad_job_id)" || true
    local deadline=$((SECONDS + RLAD_END_S)) pid
    for pid in "$@"; do
        while rlad_running "$pid" && ((SECONDS < deadline)); do sleep 0.2; done
    done
    for pid in "$@"; do
        if rlad_running "$pid"; then
            scancel --quiet --signal=KILL "$(rlad_job_id)" || true
            kill -KILL "$pid" 2>/dev/null || true
        fi
    done
}

# Why a step failed without a user error, in one line: the first task that srun names, and the last line of its log.
rlad_first_failure() { # STEP STATUS
    local line log=$rlad_folder/${1}_0.log
    line=$(grep -m1 -E 'error: [^ ]+: tasks? [0-9]' "$rlad_folder/srun_$1.err" ||
        grep -m1 'error: ' "$rlad_folder/srun_$1.err") || true
    if [[ $line =~ tasks?\ ([0-9]+) ]]; then log="$rlad_folder/${1}_${BASH_REMATCH[1]}.log"; fi
    echo "the $1 step failed first (${line:-srun ended with code $2}); $log ends with:" \
        "$(grep -a '[^[:space:]]' "$log" 2>/dev/null | tail -n 1)$(rlad_silent_ranks)"
}

rlad_run() {
    local recipe=$1 status=0 lines word line said i
    local command=("$RLAD_PYTHON" -m "$RLAD_MODULE")
    local arguments=()
    for word in "${@:2}"; do
        case $word in
            --) ;;
            runs/.submitted/*) recipe=$word ;;
            *) arguments+=("$word") ;;
        esac
    done

    if [[ -n ${RLAD_CONTAINER_IMAGE:-} && $(srun --help 2>&1) != *--container-image* ]]; then
        rlad_die "RLAD_CONTAINER_IMAGE=$RLAD_CONTAINER_IMAGE (site file): srun has no --container-image, because pyxis is" \
            "not installed on $(hostname); leave it empty, and set RLAD_PYTHON to a Python of the nodes"
    fi
    said=$(mktemp)
    lines=$(rlad_srun --nodes=1 --ntasks=1 "${command[@]}" place "$recipe" "${arguments[@]}" 2>"$said") || status=$?
    grep -v '^rlad: ' "$said" >&2 || true # srun's messages first; the task's own come last
    grep '^rlad: ' "$said" >&2 || true
    rm -f "$said"
    if ((status > 0)); then exit "$status"; fi
    local steps=() roles=() pids=() role verb nodes first tasks each
    while read -r word line; do # an image's entry point may print lines too
        case $word in
            rlad-config) recipe=$line ;;
            rlad-step) steps+=("$line") ;;
            rlad-folder) rlad_folder=$line ;;
        esac
    done <<<"$lines"
    if ((${#steps[@]} == 0)); then exit 0; fi # the run is complete
    cp "$recipe" "$rlad_folder/config.yaml"
    echo "configuration: $recipe"
    echo "tasks write to $rlad_folder; progress: tail -f $rlad_folder/trainer_0.log"

    for line in "${steps[@]}"; do # the trainer's is the first
        read -r role verb nodes first tasks each <<<"$line"
        rlad_srun --nodes="$nodes" --relative="$first" --ntasks="$tasks" --ntasks-per-node="$each" \
            --distribution=block --kill-on-bad-exit=1 --job-name="$role" --output="$rlad_folder/${role}_%t.log" \
            "${command[@]}" "$verb" "$recipe" "${arguments[@]}" 2>"$rlad_folder/srun_$role.err" &
        roles+=("$role")
        pids+=($!)
    done
    trap rlad_tell_to_stop USR1
    if [[ -n $rlad_told ]]; then rlad_tell_to_stop; fi
    trap 'rlad_end_steps "${pids[@]}"; rlad_unlock; exit 143' TERM

    rlad_wait_for_first "${pids[@]}"
    sleep 1 # for srun to report what it knows
    if [[ -e $rlad_folder/failed ]]; then
        status=$RLAD_USER_ERROR
    else
        for i in "${!pids[@]}"; do # the trainer's may have succeeded; no other step ends by itself
            rlad_running "${pids[i]}" && continue
            wait "${pids[i]}" || status=$?
            if ((status == 0)) && ! rlad_has_ended; then status=1; fi
            if ((i > 0 && status == 0)); then status=1; fi
            if ((status > 0)); then rlad_first_failure "${roles[i]}" "$status" >"$rlad_folder/failed"; fi
            break
        done
    fi
    rlad_end_steps "${pids[@]}"
    wait "${pids[@]}" || true

    if ((status > 0)); then
        cat "$rlad_folder"/srun_*.err >&2
        rm -f "$rlad_folder/requeue"
    else
        rm -f "$rlad_folder/failed" # by a task that was told to end
        if [[ ! -e $rlad_folder/requeue ]]; then grep -aE '^(report|student): ' "$rlad_folder/trainer_0.log" || true; fi
    fi
    rlad_finish "$status"
}
