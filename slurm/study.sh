#!/usr/bin/env bash
# A study on a cluster: its tasks (docs/studies.md) are those of a job array, each on a node of its own.
#
#   slurm/study.sh STUDY [--sbatch-option ...]      submits what `rlad study STUDY` would run in turn
#
# A task that is told to stop before its time limit saves, is requeued and goes on; the others do not notice. What has
# finished is not run again. With variants to choose from, or a teacher to evaluate, these are a first array, and the
# runs, which wait for it, a second. Your own --array=LIST is submitted as it is, for example --array=3,7 or 0-11%4.
# Leave the study's file as it is until all have ended: each task reads it again. On GPUs give --gpus-per-node=N.
# When all have ended: rlad study STUDY --report
#
#SBATCH --job-name=study
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --output=%x_%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail
[[ -f slurm/job.sh ]] || { echo "rlad: $PWD has no slurm/job.sh; submit from the folder of the repository" >&2; exit 2; }
source slurm/job.sh

study_submit() { # STUDY [--sbatch-option ...]
    local study=$1 word said first total before=()
    for word in "${@:2}"; do
        [[ $word == -* ]] ||
            rlad_die "'$word' is no option of sbatch; one is one word, for example --partition=gpu. A study has its own overrides"
    done
    [[ " ${*:2}" != *" --dependency"* ]] ||
        rlad_die "--dependency: the runs of a study wait for its first array; submit when the other job has ended"
    command -v sbatch >/dev/null ||
        rlad_die "no Slurm on this machine (sbatch not found); submit from a login node, or use \`rlad study\` here"
    if [[ " ${*:2}" == *" --array="* ]]; then exec sbatch "${@:2}" "$0" "$study"; fi
    [[ -n ${RLAD_LOGIN_PYTHON:-} ]] ||
        rlad_die "RLAD_LOGIN_PYTHON is empty (site file), so nothing here counts the tasks; set it, or give --array=0-LAST"
    said=$("$RLAD_LOGIN_PYTHON" -m "$RLAD_MODULE" study "$study" 2>&1) || rlad_refuse $? "$said"
    read -r first total <<<"${said##*$'\n'}"
    if ((first > 0)); then
        said=$(sbatch --parsable --array="0-$((first - 1))" "${@:2}" "$0" "$study")
        echo "Submitted batch job ${said%%;*}, which comes first"
        before=(--dependency="afterany:${said%%;*}")
    fi
    sbatch --array="$first-$((total - 1))" "${before[@]}" "${@:2}" "$0" "$study"
}

study_task() { # STUDY
    local stop pid status=0
    [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || rlad_die "no job array: run slurm/study.sh $1, or give sbatch --array=0-LAST"
    stop=runs/.submitted/stop_$(rlad_job_id)
    mkdir -p runs/.submitted && rm -f "$stop"
    # A file: a signal would reach all processes of the step (launch/signals.sh).
    trap 'touch "$stop"; echo "told to stop at $(date +%T)"' USR1
    if [[ -n $rlad_told ]]; then touch "$stop"; fi
    rlad_srun --nodes=1 --ntasks=1 "$RLAD_PYTHON" -m rlad_megatron.cli \
        study "$1" --task "$SLURM_ARRAY_TASK_ID" --stop-file "$stop" &
    pid=$!
    while rlad_running "$pid"; do
        sleep 0.5 &
        wait $! || true
    done
    wait "$pid" || status=$?
    if [[ -e $stop ]] && ((status == 143)); then
        rm -f "$stop"
        echo "stopped before its end; requeueing"
        scontrol requeue "$(rlad_job_id)"
        exit 0
    fi
    rm -f "$stop"
    exit "$status"
}

study_site=${RLAD_SITE:-slurm/site.sh}
if [[ $# == 0 || " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    sed -n '2,/^#SBATCH/{/^#SBATCH/d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi
[[ -f $study_site ]] || rlad_die "$study_site: no such file; submit from the folder of the repository, or set RLAD_SITE"
# shellcheck source=slurm/site.sh
source "$study_site"
rlad_check_site "$study_site" "${RLAD_CONTAINER_IMAGE:-}"
if [[ -n ${SLURM_JOB_ID:-} ]]; then study_task "$@"; else study_submit "$@"; fi
