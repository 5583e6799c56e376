# shellcheck shell=bash
# What the job scripts of this folder share. Sourced by them, in the clone's folder; nothing here belongs to one site (that is site.sh).

POET_SIGNAL_SECONDS=5  # between two requests to stop: one that comes while ranks start up is lost
POET_WAIT_SECONDS=120  # from the first rank's end until srun kills the others
POET_MAX_RESTARTS=20   # of jobs that continue where they were, but do not count their own progress (pretraining does)
poet_signal=''         # what asked this job to stop
poet_child=''          # process that the script waits for
poet_status=0          # its exit status

poet_say() { printf 'job: %s %s\n' "$(date '+%F %T')" "$*" >&2; }

poet_fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Prepares a job: site settings, software, performance settings, signals.
poet_begin() {
    [ -n "${SLURM_JOB_ID-}" ] || poet_fail "this is a job script: submit it with sbatch (its first lines say how)"
    trap 'poet_asked_to_stop USR1' USR1
    trap 'poet_asked_to_stop TERM' TERM
    local site=${POET_SITE:-launch/slurm/site.sh}
    [ -f "$site" ] || poet_fail "POET_SITE is $site, which does not exist on $(hostname): name a file that all nodes see"
    # shellcheck source=launch/slurm/site.sh
    . "$site"
    local gpus=${SLURM_GPUS_PER_NODE:-1}  # as asked for; with a type, h100:8
    export POET_RANKS_PER_NODE=${POET_RANKS_PER_NODE:-${gpus##*:}}
    # shellcheck source=launch/env.sh
    . launch/env.sh
    [ "$(type -t site_setup)" != function ] || site_setup || poet_fail "site_setup of $site failed on $(hostname)"
    poet_say "number $SLURM_JOB_ID${SLURM_ARRAY_TASK_ID+ (task $SLURM_ARRAY_TASK_ID)}, start $((${SLURM_RESTART_COUNT:-0} + 1))," \
        "on $SLURM_JOB_NUM_NODES node(s): $SLURM_JOB_NODELIST"
}

# Words of the command line after which an option's value stands: poet_option --output "$@".
poet_option() {
    local name=$1
    shift
    while [ $# -gt 1 ]; do
        [ "$1" != "$name" ] || { printf '%s\n' "$2" && return; }
        shift
    done
    return 1
}

# Rendezvous of the ranks: the first host of the allocation, and a port that depends on the job (nodes may be shared) and on the start (a
# port may linger). 1,500 consecutive jobs differ; the range is below those that Linux hands out by itself.
poet_rendezvous() {
    MASTER_ADDR=$(poet_persist scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0} % 8) % 12000))
    export MASTER_ADDR MASTER_PORT
}

# All ranks of `poet-megatron "$@"`, one per GPU, by srun; leaves poet_status. Jobs ask for nodes and GPUs, not for tasks: Slurm would
# keep the number of tasks of the first start, and a requeued job could not run on fewer nodes.
poet_ranks() {
    local ranks=$POET_RANKS_PER_NODE
    local cpus=$((${SLURM_CPUS_ON_NODE:-1} / ranks))
    poet_rendezvous
    poet_say "$SLURM_JOB_NUM_NODES x $ranks ranks, $((cpus > 0 ? cpus : 1)) processors each, rendezvous at $MASTER_ADDR:$MASTER_PORT: $*"
    unset SLURM_CPUS_PER_GPU SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE  # of the job; they would contradict those of the step
    # A rank's status is kept (the largest wins); ranks that lost their peers get time to report; a dead node ends the step at once.
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node="$ranks" --ntasks=$((SLURM_JOB_NUM_NODES * ranks)) \
        --cpus-per-task=$((cpus > 0 ? cpus : 1)) --cpu-bind=none --kill-on-bad-exit=0 --wait=$POET_WAIT_SECONDS --no-kill=off \
        bash launch/slurm/rank.sh "${POET_PYTHON[@]}" -m poet_megatron "$@" &
    poet_await $! USR1
}

# One process of `poet-megatron "$@"`; leaves poet_status. It is killed when the job is asked to stop.
poet_process() {
    poet_say "poet-megatron $*"
    "${POET_PYTHON[@]}" -m poet_megatron "$@" &
    poet_await $! TERM
}

# Waits for a child through any number of signals, and hands them on as signal $2.
poet_await() {
    poet_child=$1
    poet_child_signal=$2
    [ -z "$poet_signal" ] || poet_hand_on
    while kill -0 "$poet_child" 2>/dev/null; do
        wait "$poet_child"  # returns early when a signal arrives
    done
    wait "$poet_child"  # its status again, whatever interrupted the last one
    poet_status=$?
    poet_child=''
}

# Trap: the time limit is near (USR1, by #SBATCH --signal), the job is preempted (USR1 or TERM) or cancelled (TERM).
poet_asked_to_stop() {
    [ -z "$poet_signal" ] || return 0
    poet_signal=$1
    poet_say "SIG$1: time limit, preemption or scancel; asking for an end"
    [ -z "$poet_child" ] || poet_hand_on
}

# Repeats the request until the child has gone.
poet_hand_on() {
    while kill -s "$poet_child_signal" "$poet_child" 2>/dev/null; do sleep $POET_SIGNAL_SECONDS; done &
}

# Repeats a command of Slurm until it succeeds, for a minute: the controller may be busy, or be replaced just now.
poet_persist() {
    local try
    for try in 1 2 3 4 5; do
        "$@" && return 0
        sleep $((4 * try))
    done
    "$@"
}

# What Slurm says of this job: RUNNING also while it is preempted, CANCELLED or COMPLETING after scancel.
poet_state() {
    poet_persist scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p'
}

# Ends a job of ranks as its status says (docs/cluster.md has the table). $1: nodes needed; the rest: the command.
poet_finish_ranks() {
    local needed=$1 state
    shift
    state=$(poet_state)
    case $poet_status in
        0) poet_say "complete" && exit 0 ;;
        2) poet_say "status 2: the error above has to be mended; not requeued" && exit 2 ;;
        3) poet_say "status 3: the loss or a gradient is not finite (see above); not requeued" && exit 3 ;;
        4) poet_say "status 4: replicas differ; rank and host are named above (have the host checked)" ;;
        5) poet_say "status 5: ranks hung; the stacks are above or in the run directory" ;;
        75) poet_say "status 75: saved" ;;
        *) poet_say "status $poet_status: a rank or a node failed" ;;
    esac
    if [ "$state" != RUNNING ]; then
        poet_say "Slurm is ending this job (${state:-state unknown}; scancel?): not requeued; the same command continues from the newest checkpoint"
        exit "$poet_status"
    fi
    [ "$poet_status" -eq 75 ] || poet_check_nodes "$needed" "$@"
    poet_requeue
}

# Ends a job of one process: requeued if it was asked to stop, since it continues where it was.
poet_finish_process() {
    if [ "$poet_status" -eq 0 ]; then
        poet_say "complete" && exit 0
    elif [ "$poet_status" -eq 2 ]; then
        poet_say "status 2: the error above has to be mended; not requeued" && exit 2
    elif [ -z "$poet_signal" ] || [ "$(poet_state)" != RUNNING ]; then
        poet_say "status $poet_status, the job is $(poet_state): not requeued; the same command continues" && exit "$poet_status"
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge $POET_MAX_RESTARTS ]; then
        poet_say "restarted $SLURM_RESTART_COUNT times: not requeued; ask for more time (--time)" && exit "$poet_status"
    fi
    poet_requeue
}

# Ends the job here, in failure, if the partition has not enough nodes left.
poet_check_nodes() {
    local needed=$1 good='^(idle|mixed|allocated|completing|planned|reserved)[#%@+]?$' nodes usable dead run_dir newest
    shift
    nodes=$(poet_persist sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --format='%N %T') || return 0
    dead=$(awk -v good="$good" '$2 !~ good { print $1 " (" $2 ")" }' <<< "$nodes" | sort -u | paste -s -d ' ')
    nodes=$(poet_persist sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N %T') || return 0
    usable=$(awk -v good="$good" '$2 ~ good { print $1 }' <<< "$nodes" | sort -u | wc -l)
    [ -z "$dead" ] || poet_say "no longer usable: $dead"
    [ "$usable" -lt "$needed" ] || return 0
    run_dir=$("${POET_PYTHON[@]}" -m poet_megatron "$@" --print-config 2>/dev/null | sed -n 's/^  run_dir: //p')
    newest=$(find "$run_dir/checkpoints" -maxdepth 1 -name 'step-????????' 2>/dev/null | sort | tail -n 1)
    poet_say "partition $SLURM_JOB_PARTITION has $usable usable node(s) and this job needs $needed: not requeued; when there are enough," \
        "or with fewer --nodes, the same command continues from ${newest:-the beginning (there is no checkpoint yet)}"
    exit 1
}

poet_requeue() {
    poet_say "requeued: Slurm starts the job again, usually after two minutes, and it continues from the newest checkpoint"
    poet_persist scontrol requeue "$SLURM_JOB_ID" || {
        poet_say "scontrol requeue failed (is requeueing switched off?): submit the same command again" && exit "$poet_status"
    }
    trap - USR1 TERM
    sleep 600  # until Slurm ends this start
}
