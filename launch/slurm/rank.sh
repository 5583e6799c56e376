#!/bin/bash
# One task of srun: gives its command the environment of a rank, and runs it on the processors next to its GPU. lib.sh calls it:
#
#     srun ... bash launch/slurm/rank.sh python -m poet_megatron pretrain --config ...
set -u
if [ -z "${SLURM_PROCID-}" ] || [ -z "${MASTER_ADDR-}" ]; then
    echo "error: rank.sh is started by srun, through launch/slurm/lib.sh" >&2
    exit 2
fi
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))

# Until Python has its handler, a request to save would kill this process; lib.sh repeats it.
trap '' USR1

# NUMA node of this rank's GPU; nothing where it cannot be told.
numa_node() {
    local gpus gpu bus node
    IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES:-$LOCAL_RANK}"
    gpu=${gpus[LOCAL_RANK]:-$LOCAL_RANK}
    bus=$(nvidia-smi --id="$gpu" --query-gpu=pci.bus_id --format=csv,noheader 2>/dev/null | tr '[:upper:]' '[:lower:]')  # 00000000:1b:00.0
    node=$(cat "/sys/bus/pci/devices/${bus#0000}/numa_node" 2>/dev/null)
    [ "${node:--1}" -lt 0 ] || echo "$node"
}

bind=()
if command -v numactl > /dev/null && command -v nvidia-smi > /dev/null; then
    node=$(numa_node)
    # Host memory and launches of kernels stay on the GPU's socket; memory may come from elsewhere when it runs out there.
    [ -z "$node" ] || ! numactl --cpunodebind="$node" true 2>/dev/null || bind=(numactl --cpunodebind="$node" --preferred="$node")
fi
exec ${bind[@]+"${bind[@]}"} "$@"
