# shellcheck shell=bash disable=SC2154 # rlad_folder and pids are the caller's
# How a job stops, for slurm/job.sh and the scripts of NeMo-Run (launch/nemo.py). The caller sets rlad_folder, the folder
# of this start of the job, and the array pids, its sruns; it traps SIGUSR1, and ends with rlad_finish.

readonly RLAD_LAST_S=45   # before the time limit, at which a run that has not stopped fails
readonly RLAD_SILENT_S=15 # as in launch/heartbeat.py

# In a job array SLURM_JOB_ID can name the whole array.
rlad_job_id() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        echo "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    else
        echo "$SLURM_JOB_ID"
    fi
}

# The time limit is near. The trainer looks for the file `stop` before each step, saves and exits. If it does not in
# time, the job fails with an error, because Slurm would kill it without one.
rlad_tell_to_stop() {
    local end
    trap : USR1 # Slurm and a user may both send it
    touch "$rlad_folder/stop"
    echo "told to stop at $(date +%T)"
    # Without a limit, or without an answer from squeue, there is no deadline. date would read an empty word as midnight.
    end=$(squeue --noheader --jobs="$(rlad_job_id)" --format=%e) && [[ -n $end ]] || return 0
    end=$(date --date="$end" +%s 2>/dev/null) || return 0
    end=$((SECONDS + end - $(date +%s) - RLAD_LAST_S))
    {
        set +xv
        while ((SECONDS < end)); do
            sleep 1
            kill -0 $$ 2>/dev/null || exit # the batch script has ended, and Slurm may not find this process
        done
        rlad_fail_late
    } &
}

rlad_fail_late() {
    local checkpoint
    if [[ -e $rlad_folder/failed || -e $rlad_folder/requeue ]]; then return; fi
    checkpoint=$(cat "$rlad_folder/../../checkpoints/latest" 2>/dev/null) || checkpoint=none
    echo "told to stop before the time limit, but its start or its step did not end in time (newest checkpoint:" \
        "$checkpoint); continue with resume=true, and a longer --time or an earlier --signal=B:USR1@SECONDS" \
        >"$rlad_folder/failed"
    kill "${pids[@]}" 2>/dev/null
}

# Once all steps have ended: a rank that was killed leaves the lock of the run folder (launch/lock.py).
rlad_unlock() {
    if grep -qs "\"job\": \"$SLURM_JOB_ID\"" "$rlad_folder/../../lock"; then rm -f "$rlad_folder/../../lock"; fi
}

# Whether the trainer said that it finished, or stopped. An exit code of 0 does not say so.
rlad_has_ended() {
    [[ -e $rlad_folder/finished || -e $rlad_folder/requeue ]]
}

# Names the ranks that had stopped to give signs of life (launch/heartbeat.py) when others still did.
rlad_silent_ranks() {
    local file times now=0 time
    times=$(stat --format='%Y %n' "$rlad_folder"/alive_* 2>/dev/null) || return 0
    while read -r time _; do now=$((time > now ? time : now)); done <<<"$times"
    while read -r time file; do
        if ((now - time > RLAD_SILENT_S)); then
            echo -n "; rank ${file##*_} ($(<"$file")) had given no sign of life for $((now - time)) s"
        fi
    done <<<"$times"
}

# The end of the job: shows the first error, requeues a run that has stopped, and exits.
rlad_finish() { # STATUS
    local status=$1
    set +xv # NeMo-Run's script prints its lines
    rlad_unlock
    if ((status == 0)) && ! rlad_has_ended; then status=1; fi
    if ((status > 0)) && [[ ! -s $rlad_folder/failed ]]; then
        echo "a task ended before the run had finished; see the logs of the tasks$(rlad_silent_ranks)" \
            >"$rlad_folder/failed"
    fi
    if [[ -s $rlad_folder/failed ]]; then sed 's/^/rlad: /' "$rlad_folder/failed" >&2; fi
    if [[ -e $rlad_folder/requeue ]]; then
        echo "stopped before its end; requeueing"
        scontrol requeue "$(rlad_job_id)"
    fi
    exit "$status"
}
