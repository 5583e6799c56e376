# shellcheck shell=bash
# Performance and safety settings of a training process on nodes of 8 H100s, each with its reason. Sourced by launch/torchrun/pretrain.sh
# and by the job scripts of launch/slurm, after the site's settings. A variable that is set already is left alone, so yours win:
#
#     NCCL_DEBUG=INFO launch/torchrun/pretrain.sh configs/llama_1b3_poet_bs256.yaml
#
# Nothing here belongs to one site: interfaces, adapters and paths go into launch/slurm/site.sh. Names and defaults were checked against
# torch 2.13 (its headers and libraries) and the documentation of NCCL up to 2.31. None of it was timed: this project has had no GPU to
# time on.

poet_default() { [ -n "${!1+set}" ] || export "$1=$2"; }

# --- Kernels and collectives ----------------------------------------------------------------------------------------------------------
# CUDA_DEVICE_MAX_CONNECTIONS is left to poet_megatron, which knows the layout and sets it to 1 if parallel.tensor_parallel is above 1,
# before CUDA starts. With 1, kernels start in the order of their launch, so a collective launched before a product really runs beside it;
# Megatron relies on that order. The price: all streams of a process share one queue, so a reduction of gradients, a copy or a prefetch
# can wait behind kernels that it does not depend on. Without tensor parallelism there is nothing to gain, and CUDA's default (8) lets the
# data-parallel reduction overlap freely.

# Grows memory segments instead of allocating new ones, so that ragged sizes (evaluation beside training, merges) do not fragment the
# GPU's memory. The old name on purpose: torch 2.13 reads both, 2.9 ignores this option under the new one (PYTORCH_ALLOC_CONF), and
# releases before know the old one only. Some (2.8 to 2.11) print a harmless deprecation warning.
[ -n "${PYTORCH_ALLOC_CONF+set}" ] || poet_default PYTORCH_CUDA_ALLOC_CONF expandable_segments:True

# NVIDIA_TF32_OVERRIDE and torch's TF32 switches are left alone: bf16 training does not use them, and where something is computed in fp32
# (Cayley maps, merges) it is for its precision.

# --- NCCL -----------------------------------------------------------------------------------------------------------------------------
# Warnings name the cause of a failure ("no socket interface found", "NVLS multicast memory"); INFO also logs the topology and is for
# debugging.
poet_default NCCL_DEBUG WARN
# NCCL finds NVLink, NVSwitch and InfiniBand by itself. What is often set and should not be, unless a measurement here says so:
#   NCCL_NVLS_ENABLE: the default uses the reductions of NVSwitch where they work. Set 0 only if NCCL says that NVLS multicast memory cannot
#     be bound: a fault of the fabric manager (have the node restarted) or, with NCCL 2.29.7, too many groups of ranks.
#   NCCL_IB_GID_INDEX: chosen automatically since NCCL 2.21, and never needed on InfiniBand.
#   NCCL_IB_TIMEOUT, NCCL_IB_RETRY_CNT: 20 and 7 by default, seven times 4 s at least; raising them makes a dead link fail later.
#   NCCL_IB_QPS_PER_CONNECTION: above 1 it helps on fabrics that route each connection statically, and costs latency elsewhere.
#   NCCL_P2P_LEVEL, NCCL_NET_GDR_LEVEL, NCCL_CROSS_NIC: NCCL decides by the topology; a value copied from elsewhere fits another machine.
#   NCCL_ALGO, NCCL_PROTO, NCCL_BUFFSIZE, NCCL_MIN_NCHANNELS: overrule the tuner for all sizes to help one.
#   NCCL_P2P_DISABLE, NCCL_SHM_DISABLE, NCCL_IB_DISABLE: for bisecting a fault; each takes a fast path away.
# And of torch and CUDA: TORCH_NCCL_BLOCKING_WAIT and CUDA_LAUNCH_BLOCKING serialize every step; NCCL_ASYNC_ERROR_HANDLING (without
# TORCH_) is the old name of the next one.

# When a collective fails or times out: end the process at once (3). torchrun would set 1, which first aborts the communicators; that can
# hang itself, with a job that burns its time limit. 3 is torch's own default, which ranks started by srun get.
poet_default TORCH_NCCL_ASYNC_ERROR_HANDLING 3
# torch's flight recorder keeps the last collectives of each rank (a few MB of host memory); guard.watchdog writes them down when a run
# hangs. Older releases call it TORCH_NCCL_TRACE_BUFFER_SIZE.
poet_default TORCH_FR_BUFFER_SIZE 2000
# The same when NCCL's own watchdog is first (parallel.timeout_minutes). It needs TORCH_NCCL_ENABLE_MONITORING, which is on by default.
# The files go to ~/.cache/torch/comm_lib_trace_rank_N, or behind the prefix TORCH_FR_DUMP_TEMP_FILE; `torchfrtrace` reads them.
poet_default TORCH_NCCL_DUMP_ON_TIMEOUT 1

# --- Processes and the host -----------------------------------------------------------------------------------------------------------
# GPU numbers of CUDA are then those of nvidia-smi, in which binding to NUMA nodes and error messages speak.
poet_default CUDA_DEVICE_ORDER PCI_BUS_ID
# Threads of CPU operators in each rank: its share of the processors, 8 at most; a rank launches kernels and needs few. torchrun would set
# 1; without either, every rank would start a thread per processor of the node.
poet_share=$(($(nproc) / ${POET_RANKS_PER_NODE:-8}))
poet_default OMP_NUM_THREADS $((poet_share < 1 ? 1 : poet_share > 8 ? 8 : poet_share))
# The tokenizers library would start threads of its own, and warn in every process that forks after it did.
poet_default TOKENIZERS_PARALLELISM false
# Compute nodes often cannot reach the Hugging Face hub, and a run needs nothing from it: do not wait for timeouts. A job that streams a
# dataset from the hub needs HF_HUB_OFFLINE=0.
poet_default HF_HUB_OFFLINE 1
# Stacks of all threads on a segmentation fault or an abort, which is how CUDA and NCCL die.
poet_default PYTHONFAULTHANDLER 1
# Lines reach the log when they are printed, not when a buffer is full.
poet_default PYTHONUNBUFFERED 1

# --- Limits ---------------------------------------------------------------------------------------------------------------------------
# Open files: every shard of the data, every socket of NCCL and every file of a checkpoint is one; the usual 1024 is too few. Not
# "unlimited", which some systems take for 2^30, and some libraries close them all one by one.
poet_files=$(ulimit -Hn)
[ "$poet_files" != unlimited ] && [ "$poet_files" -lt 65536 ] || poet_files=65536
[ "$(ulimit -Sn)" = unlimited ] || [ "$(ulimit -Sn)" -ge "$poet_files" ] || ulimit -Sn "$poet_files"
# No core dumps: one holds the host memory of a rank, tens of GB, and eight fill a disk. `ulimit -Sc unlimited` after this brings them
# back.
ulimit -Sc 0
# InfiniBand needs memory that cannot be swapped. Only the administrator can raise this limit (in Slurm:
# PropagateResourceLimitsExcept=MEMLOCK).
if [ -d /sys/class/infiniband ] && [ "$(ulimit -l)" != unlimited ]; then
    echo "launch/env.sh: ulimit -l is $(ulimit -l) kB on $(hostname); NCCL over InfiniBand needs unlimited" >&2
fi

unset -f poet_default
unset poet_share poet_files
