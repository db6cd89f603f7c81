# shellcheck shell=bash
# What the scripts in this folder share. Run as a command, a script checks the run and submits itself; given to sbatch,
# or inside an allocation, it is the job: an srun step for the trainer's ranks, one for the teacher's if it has its own,
# and one for the rollout servers.
#
#   rlad_job RECIPE [key=value ...] -- "$@"
#
# What follows -- is the user's: key=value, and options that begin with a dash, which go to sbatch.

readonly RLAD_MODULE=rlad_megatron.launch.slurm
readonly RLAD_END_S=20       # for the other tasks to end by themselves, once one has ended
readonly RLAD_USER_ERROR=2   # exit code for what the user can mend
readonly RLAD_LAST_S=45      # before the time limit: for a run that has not stopped to be ended with an error

# Slurm sends SIGUSR1 before the time limit (#SBATCH --signal), with a short limit at once. Its default would end this
# script.
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
    [[ -n ${RLAD_PYTHON:-} ]] || rlad_die "RLAD_PYTHON is not set ($1); name the python of the tasks there"
    if [[ $2 == *.sqsh && $2 != [./]* ]]; then
        rlad_die "RLAD_CONTAINER_IMAGE=$2 ($1): pyxis takes that for an image of a registry; write ./$2"
    elif [[ $2 == [./]* && ! -f $2 ]]; then
        rlad_die "RLAD_CONTAINER_IMAGE=$2 ($1): no such file; build it (docs/operations.md) or mend the path"
    fi
    [[ $RLAD_PYTHON == */* && $RLAD_PYTHON != /* ]] || return 0
    if [[ -n $2 ]]; then
        rlad_die "RLAD_PYTHON=$RLAD_PYTHON ($1) is a file of the host; with RLAD_CONTAINER_IMAGE give the container's python" \
            "(/opt/rlad/bin/python in the Dockerfile's)"
    elif [[ ! -x $RLAD_PYTHON ]]; then
        rlad_die "RLAD_PYTHON=$RLAD_PYTHON ($1): no such program in this folder; make the environment (docs/operations.md)" \
            "or mend the path"
    fi
}

rlad_die() {
    echo "rlad: $*" >&2
    exit "$RLAD_USER_ERROR"
}

# What the script says of itself, which is its first comment, and what may follow its name.
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
                 name=NAME is the run's folder in runs/, resume=true goes on with the run of that name
  --option=...   goes to sbatch and overrides the script's #SBATCH lines; one word, for example --partition=gpu
site file: ${RLAD_SITE:-slurm/site.sh} (RLAD_SITE names another): partition, account, container, python of the nodes
more: docs/operations.md
END
    exit 0
}

rlad_submit() {
    local recipe=$1 own=() options=() overrides=() word said
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
        said=$("$RLAD_LOGIN_PYTHON" -m "$RLAD_MODULE" check "$0" "${options[@]}" "$recipe" "${own[@]}" "${overrides[@]}" 2>&1) ||
            rlad_refuse $? "$said"
        if [[ -n $said ]]; then echo "$said" >&2; fi
    fi
    exec sbatch "${options[@]}" "$0" "${overrides[@]}"
}

# A check on the login node has not passed: what it said, unless that python could not make it.
rlad_refuse() { # STATUS TEXT
    local needs='import sys; assert sys.version_info >= (3, 11), sys.version.split()[0]; import omegaconf, yaml' lacks
    if (($1 != RLAD_USER_ERROR)) && ! lacks=$("$RLAD_LOGIN_PYTHON" -c "$needs" 2>&1); then
        rlad_die "RLAD_LOGIN_PYTHON=$RLAD_LOGIN_PYTHON (site file) cannot check the run (${lacks##*$'\n'}); name a Python" \
            "3.11 or newer with omegaconf and PyYAML (make setup), or leave it empty: then the job makes the check"
    fi
    echo "$2" >&2
    exit "$1"
}

# A step of the job, in the container if there is one. All steps may use whatever the job has: --overlap.
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

# The trainer looks for this file before each step, saves and leaves. If it does not in time, Slurm would end the job
# without a word.
rlad_tell_to_stop() { # FOLDER
    local end
    touch "$1/stop"
    end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) || true
    # There may be no limit, and squeue no answer, which date would take for midnight.
    if [[ -n $end ]] && end=$(date --date="$end" +%s 2>/dev/null); then
        rlad_deadline=$((SECONDS + end - $(date +%s) - RLAD_LAST_S))
    fi
    echo "told to stop at $(date +%T)"
}

rlad_is_late() {
    [[ -n ${rlad_deadline:-} ]] && ((SECONDS >= rlad_deadline))
}

# Waits until one of the steps has ended, a task has said why it fails, or it is too late. Signals are handled meanwhile.
rlad_wait_for_first() { # FOLDER PID...
    local pid
    while [[ ! -e $1/failed ]] && ! rlad_is_late; do
        for pid in "${@:2}"; do rlad_running "$pid" || return 0; done
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

# What failed first, in one line: the error that a task has left, else the first task that srun names and the last line
# of its log. To be asked before the other tasks are ended.
rlad_first_failure() { # FOLDER STEP STATUS
    local folder=$1 step=$2 line log
    if [[ -s $folder/failed ]]; then
        cat "$folder/failed"
        return
    elif [[ $step == nobody ]]; then
        line=$(cat "$folder/../../checkpoints/latest" 2>/dev/null) || line="none"
        echo "told to stop before the time limit, but its start or its step did not end in time (newest checkpoint: $line);" \
            "go on with resume=true, and a longer --time or an earlier --signal=B:USR1@SECONDS"
        return
    fi
    line=$(grep -m1 -E 'error: [^ ]+: tasks? [0-9]' "$folder/srun_$step.err" ||
        grep -m1 'error: ' "$folder/srun_$step.err") || true
    log="$folder/${step}_0.log"
    if [[ $line =~ tasks?\ ([0-9]+) ]]; then log="$folder/${step}_${BASH_REMATCH[1]}.log"; fi
    echo "the $step step failed first (${line:-srun ended with code $3}); $log ends with:" \
        "$(grep -a '[^[:space:]]' "$log" 2>/dev/null | tail -n 1)"
}

rlad_run() {
    local recipe=$1 status=0 ended=trainer lines word line said failure="" i
    local command=("$RLAD_PYTHON" -m "$RLAD_MODULE")
    local arguments=()
    for word in "${@:2}"; do
        if [[ $word != -- ]]; then arguments+=("$word"); fi
    done

    if [[ -n ${RLAD_CONTAINER_IMAGE:-} && $(srun --help 2>&1) != *--container-image* ]]; then
        rlad_die "RLAD_CONTAINER_IMAGE=$RLAD_CONTAINER_IMAGE (site file): srun knows no --container-image, for pyxis is" \
            "not installed on $(hostname); leave it empty, and RLAD_PYTHON a python of the nodes"
    fi
    said=$(mktemp)
    lines=$(rlad_srun --nodes=1 --ntasks=1 "${command[@]}" place "$recipe" "${arguments[@]}" 2>"$said") || status=$?
    grep -v '^rlad: ' "$said" >&2 || true # srun speaks after the task; what the task said comes last
    grep '^rlad: ' "$said" >&2 || true
    rm -f "$said"
    if ((status > 0)); then exit "$status"; fi
    local steps=() roles=() pids=() role verb nodes first tasks each folder
    while read -r word line; do # an image's entry point may speak too
        case $word in
            rlad-step) steps+=("$line") ;;
            rlad-folder) folder=$line ;;
        esac
    done <<<"$lines"
    echo "tasks write to $folder; progress: tail -f $folder/trainer_0.log"

    for line in "${steps[@]}"; do # the trainer's is the first
        read -r role verb nodes first tasks each <<<"$line"
        rlad_srun --nodes="$nodes" --relative="$first" --ntasks="$tasks" --ntasks-per-node="$each" \
            --distribution=block --kill-on-bad-exit=1 --job-name="$role" --output="$folder/${role}_%t.log" \
            "${command[@]}" "$verb" "$recipe" "${arguments[@]}" 2>"$folder/srun_$role.err" &
        roles+=("$role")
        pids+=($!)
    done
    trap 'rlad_tell_to_stop "$folder"' USR1
    if [[ -n $rlad_told ]]; then rlad_tell_to_stop "$folder"; fi
    trap 'rlad_end_steps "${pids[@]}"; exit 143' TERM

    rlad_wait_for_first "$folder" "${pids[@]}"
    sleep 1 # for srun to say what it knows
    if ! rlad_running "${pids[0]}"; then
        wait "${pids[0]}" || status=$?
    elif rlad_is_late; then
        ended=nobody status=1
    else
        status=1
        for i in "${!pids[@]}"; do
            rlad_running "${pids[i]}" && continue
            ended=${roles[i]}
            wait "${pids[i]}" || status=$?
            break
        done
    fi
    if [[ -e $folder/failed ]]; then status=$RLAD_USER_ERROR; fi
    if ((status > 0)); then failure=$(rlad_first_failure "$folder" "$ended" "$status"); fi
    rlad_end_steps "${pids[@]}"
    wait || true

    if [[ -n $failure ]]; then
        cat "$folder"/srun_*.err >&2
        echo "rlad: $failure" >&2
        exit "$status"
    elif [[ -e $folder/requeue ]]; then
        echo "stopped before its end; requeueing"
        scontrol requeue "$SLURM_JOB_ID"
    else
        grep -aE '^(report|student): ' "$folder/trainer_0.log" || true
    fi
}
