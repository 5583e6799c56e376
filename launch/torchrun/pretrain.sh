#!/bin/bash
# Pretraining on one node, one rank per GPU, through torchrun:
#
#     launch/torchrun/pretrain.sh CONFIG [--section.key value ...]
#     launch/torchrun/pretrain.sh configs/llama_60m_poet_bs256.yaml --data.path data/c4 --train.run_dir runs/first
#
# From the environment:
#     GPUS=4        ranks, and GPUs that they use; by default all that are visible (CUDA_VISIBLE_DEVICES chooses which)
#     RANKS=2       where there is no GPU: ranks on the CPU, over gloo
#     RESTARTS=3    after a crash, a hang or replicas that differ, start again from the newest checkpoint, at most so often; default never
#     PYTHON=...    by default the clone's .venv/bin/python, if it is there and no other environment is active, else python
#
# SIGTERM, SIGUSR1, SIGHUP or Ctrl-C: the ranks finish their step, save, and leave. A second one ends them within half a minute.
#
# Exit status, as of `poet-megatron pretrain`: 0 complete; 75 saved on request, the same command continues; 2 a mistake to mend; 3 a loss
# that is not finite; 4 replicas that differ; 5 a hang; otherwise the status of the rank that failed first.
set -u

say() { printf 'pretrain.sh: %s\n' "$*" >&2; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
launch=$(dirname "$here")
requests=0   # signals that asked for an end
torchrun=''  # its process
status=0     # of the last launch

if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    fail "usage: launch/torchrun/pretrain.sh CONFIG [--section.key value ...]; its first lines explain"
fi
config=$1
shift
if [ -z "${PYTHON-}" ]; then
    PYTHON=python
    [ -n "${VIRTUAL_ENV-}" ] || [ ! -x "$launch/../.venv/bin/python" ] || PYTHON=$launch/../.venv/bin/python
fi
command -v "$PYTHON" > /dev/null || fail "there is no $PYTHON: activate the environment that poet_megatron is installed in, or set PYTHON"

visible_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c '^[0-9GM]'  # 0, GPU-..., MIG-...; not -1
    else
        nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU'
    fi
}

gpus=$(visible_gpus)
ranks=${GPUS:-${RANKS:-$gpus}}
[[ $ranks =~ ^[0-9]+$ ]] || fail "the number of ranks is '$ranks'; GPUS and RANKS are whole numbers"
[ "$ranks" -gt 0 ] || fail "no GPU is visible here (nvidia-smi, CUDA_VISIBLE_DEVICES); RANKS=2 before the command trains on the CPU"
if [ -n "${GPUS-}" ] || [ "$gpus" -gt 0 ]; then
    [ "$ranks" -le "$gpus" ] || fail "$ranks ranks need as many GPUs, and $gpus are visible here (nvidia-smi, CUDA_VISIBLE_DEVICES)"
fi
[[ ${RESTARTS:-0} =~ ^[0-9]+$ ]] || fail "RESTARTS is '$RESTARTS'; it is a whole number"

export POET_RANKS_PER_NODE=$ranks
# shellcheck source=launch/env.sh
. "$launch/env.sh"

# shellcheck disable=SC2317  # called by the traps
asked_to_stop() {
    requests=$((requests + 1))
    if [ "$requests" -eq 1 ]; then
        say "SIG$1: the ranks finish their step, save and leave"
        hand_on &
    elif [ -n "$torchrun" ]; then
        say "SIG$1 again: ending the ranks"
        kill -s TERM "$torchrun" 2>/dev/null
    fi
}
for name in TERM USR1 HUP INT; do
    # shellcheck disable=SC2064  # the name now, not later
    trap "asked_to_stop $name" "$name"
done
folder=$(mktemp -d) || exit 1  # rank.sh leaves process numbers and exit statuses of the ranks here
export POET_RANKS_FOLDER=$folder
trap 'rm -rf "$folder"' EXIT

# Asks the ranks themselves, not torchrun: it dies of USR1, and on TERM it gives ranks half a minute before it kills them. Until they are
# gone, because a rank that is still starting does not hear it.
hand_on() {
    while kill -0 "$torchrun" 2>/dev/null; do
        signal_ranks USR1
        sleep 2
    done
}

# Sends a signal to the ranks that are running; false if none is.
signal_ranks() {
    local file any=1
    for file in "$folder"/process-*; do
        if [ -s "$file" ] && kill -s "$1" "$(< "$file")" 2>/dev/null; then any=0; fi
    done
    return $any
}

# Runs all ranks to their end; leaves status.
launch_ranks() {
    rm -f "$folder"/*
    # A session of its own, so that Ctrl-C and a closed terminal reach this script alone. Deaf to USR1, and so are the ranks until Python
    # has its handler: they are asked while they start, and all of a job may be, which torchrun would not survive.
    (trap '' USR1 && exec setsid "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$ranks" --max-restarts=0 --no-python \
        bash "$here/rank.sh" "$PYTHON" -m poet_megatron pretrain --config "$config" "$@") &
    torchrun=$!
    [ "$requests" -eq 0 ] || hand_on &  # of a signal that came in between
    while kill -0 "$torchrun" 2>/dev/null; do
        wait "$torchrun"  # returns early when a signal arrives
    done
    wait "$torchrun"
    status=$?
    torchrun=''
    if signal_ranks KILL; then
        say "torchrun ended with status $status before its ranks, which are ended too"
        sleep 1  # rank.sh writes down their statuses
    fi
    set_status
}

# Sets status from what the ranks left, "RANK STATUS" in the order of their ends: torchrun itself only says whether one failed.
set_status() {
    local failed saved
    [ -s "$folder/ended" ] || return 0
    failed=$(awk '$2 != 0 && $2 != 75 && $2 != 143 { print $2; exit }' "$folder/ended")  # 143: ended by torchrun, after another failed
    saved=$(awk '$2 == 75 { print $2; exit }' "$folder/ended")
    if [ -n "$failed" ]; then
        status=$failed
    elif [ "$status" -eq 0 ] && [ -n "$saved" ]; then
        status=75
    fi
}

# A mistake in the settings is said once, and not by every rank.
"$PYTHON" -m poet_megatron pretrain --config "$config" "$@" --print-config > /dev/null || exit $?
starts=0
while [ "$requests" -eq 0 ]; do
    starts=$((starts + 1))
    say "start $starts, $ranks ranks: pretrain --config $config $*"
    launch_ranks "$@"
    case $status in
        0) say "complete" && exit 0 ;;
        75) say "saved; the same command continues" && exit 75 ;;
        2 | 3) say "status $status: see the error above" && exit "$status" ;;
    esac
    say "status $status: a rank failed; the same command continues from the newest checkpoint"
    [ "$requests" -eq 0 ] || exit "$status"
    [ "$starts" -le "${RESTARTS:-0}" ] || exit "$status"
done
say "stopped before the ranks started"
exit 75
