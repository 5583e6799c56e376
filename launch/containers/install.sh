#!/bin/bash
# Installs poet_megatron and what belongs to it in a container that is being built from BASE_IMAGE; Dockerfile and poet_megatron.def run it,
# in a copy of the clone. Every version comes from versions.env.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
set -a
# shellcheck source=launch/containers/versions.env
. launch/containers/versions.env
set +a
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
export PIP_BREAK_SYSTEM_PACKAGES=1  # the container is the environment
unset PIP_CONSTRAINT                # NVIDIA's images pin packages by it

# The base image's torch stays: it is built for its CUDA.
torch=$(python -c 'import torch; print(torch.__version__)')
cuda=$(python -c 'import torch; print(torch.version.cuda)')
if [ "${torch%%+*}" != "$TORCH_VERSION" ] || [ "$cuda" != "$CUDA_VERSION" ]; then
    echo "error: $BASE_IMAGE has torch $torch for CUDA $cuda; versions.env says $TORCH_VERSION for $CUDA_VERSION: change one of them" >&2
    exit 1
fi

# git fetches Apex; rdma-core is how NCCL reaches InfiniBand, without which it takes TCP and says so only with NCCL_DEBUG=INFO; numactl
# binds ranks to the processors next to their GPU.
apt-get update
apt-get install -y --no-install-recommends g++ git rdma-core ibverbs-providers numactl python3-dev
rm -rf /var/lib/apt/lists/*

constraints=$(mktemp)
{
    grep -v '^torch==' constraints/cpu.txt
    echo "torch==$torch"
    echo "megatron-core==$MEGATRON_CORE_VERSION"
    echo "deepspeed==$DEEPSPEED_VERSION"
} | sort -u > "$constraints"
pip install -c "$constraints" setuptools pybind11 ninja packaging wheel
# In place, so that the tests run with it; compiled in a step of its own, whose failure is an error.
POET_NATIVE=0 pip install -c "$constraints" --no-build-isolation -e '.[data,deepspeed,dev]'
find poet_megatron -name '*.so' -delete  # of the machine that the clone was copied from
POET_NATIVE=1 POET_CUDA=1 python setup.py build_ext --inplace

if [ -n "$APEX_REF" ]; then
    # From git: the registry's project of that name is something else. Its build needs minutes per processor and much memory.
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 MAX_JOBS="${MAX_JOBS:-4}" pip install -v -c "$constraints" --no-build-isolation \
        "git+https://github.com/NVIDIA/apex@$APEX_REF"
fi
rm "$constraints"
python launch/containers/check.py
