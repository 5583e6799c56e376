# shellcheck shell=bash
# Everything that differs from cluster to cluster. Copy it, edit the copy, and name it in POET_SITE (or edit this file):
#
#     cp launch/slurm/site.sh ~/poet-site.sh && export POET_SITE=~/poet-site.sh
#
# It is sourced by `poet-megatron launch` on the login node and by every job. So the top level only sets variables; what takes time or
# needs the compute node goes into site_setup. Check a change with: bash -n FILE && poet-megatron launch ... --dry-run

# --- What to charge, and where to run -------------------------------------------------------------------------------------------------
# sbatch reads these itself; the same options of `poet-megatron launch` and on sbatch's command line win over them. Before a plain sbatch,
# source this file. `sinfo -s` lists partitions, `sacctmgr show associations user=$USER` accounts and qos.
#export SBATCH_ACCOUNT=my-project
#export SBATCH_PARTITION=gpu
#export SBATCH_QOS=normal
#export SBATCH_CONSTRAINT=h100
#export SBATCH_RESERVATION=my-reservation

# Partition of jobs that need no GPU (tokenizing, merging, comparing); empty: the same as for all others.
export POET_CPU_PARTITION="${POET_CPU_PARTITION-}"

# --- Software -------------------------------------------------------------------------------------------------------------------------
# Runs in each job before anything else, with the clone as its folder; ranks inherit the environment that it leaves.
site_setup() {
    #module purge && module load cuda/12.8 python/3.11
    if [ -z "${VIRTUAL_ENV-}" ] && [ -f .venv/bin/activate ]; then
        # shellcheck source=/dev/null
        . .venv/bin/activate
    fi
}

# The command that runs Python, as a list of words. In a container (launch/containers/), every rank starts one; mount the clone, the data
# and the runs at the paths that they have outside.
# shellcheck disable=SC2034  # used by lib.sh
POET_PYTHON=(python)
#POET_PYTHON=(apptainer exec --nv --bind /scratch "$HOME/poet.sif" python)
#POET_PYTHON=(podman run --rm --device nvidia.com/gpu=all --net host --ipc host -v /scratch:/scratch -w "$PWD" poet python)

# --- Network --------------------------------------------------------------------------------------------------------------------------
# The interface by which nodes reach each other: the first step hangs, or NCCL says "no socket interface found", if the automatic choice
# is wrong. `ip -br address` on a compute node lists them; a name without a number matches all that begin with it.
#export NCCL_SOCKET_IFNAME=ib0
#export GLOO_SOCKET_IFNAME=ib0
# InfiniBand adapters that NCCL may use (`ibstat -l`), where a node has others too, such as one for storage.
#export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_7
# Which entry of the GID table RoCE uses (`show_gids`), where the default does not connect; not for InfiniBand.
#export NCCL_IB_GID_INDEX=3
# Choices of NCCL at start-up, in the log: set it when nodes do not find each other or bandwidth is low.
#export NCCL_DEBUG=INFO

# --- Disks ----------------------------------------------------------------------------------------------------------------------------
# Clone, data and train.run_dir must be on a file system that all nodes share. Caches of torch and Triton want a fast local one.
export TMPDIR="${TMPDIR:-/tmp}"
#export TRITON_CACHE_DIR="$TMPDIR/triton-$USER"
#export HF_HOME=/scratch/$USER/huggingface
