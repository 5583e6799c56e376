#!/bin/bash
# One rank under torchrun: runs its command and leaves behind what torchrun does not tell, for pretrain.sh:
#
#     $POET_RANKS_FOLDER/process-RANK    number of the process, to send signals to
#     $POET_RANKS_FOLDER/ended           one line "RANK STATUS" per rank that has ended, in that order
set -u
# torchrun ends the others when a rank fails, with TERM to this shell and its child: stay to write down the child's status.
trap : TERM

"$@" &
child=$!
echo "$child" > "$POET_RANKS_FOLDER/process-$RANK"
while kill -0 "$child" 2>/dev/null; do
    wait "$child"  # returns early when a signal arrives
done
wait "$child"
status=$?
echo "$RANK $status" >> "$POET_RANKS_FOLDER/ended"
rm -f "$POET_RANKS_FOLDER/process-$RANK"
# Saved on request is no failure: torchrun would report it as one and end ranks that are about to leave by themselves.
[ "$status" -ne 75 ] || status=0
exit "$status"
