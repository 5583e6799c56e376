#!/bin/bash
# Checks a built container, from inside; with a GPU also the tests that need one:
#
#     docker run --rm --gpus all poet-megatron bash /opt/poet_megatron/launch/containers/check.sh
#     apptainer exec --nv poet-megatron.sif bash /opt/poet_megatron/launch/containers/check.sh
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python}
status=0
"$python" launch/containers/check.py "$@" || status=$?
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    "$python" -m pytest -q -m gpu -p no:cacheprovider tests || status=$?  # the image may be read-only
else
    echo "the tests that need a GPU: not run, there is none here"
fi
exit $status
