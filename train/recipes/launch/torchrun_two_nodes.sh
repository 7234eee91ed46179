#!/usr/bin/env bash
# Two machines with 4 GPUs each, so that the 8 devices of the paper's recipes come together. Run each stage on both:
#   HEAD=first-machine bash torchrun_two_nodes.sh paper/contrastive data.root=/data training.output_dir=/shared/runs/contrastive
#   HEAD=first-machine bash torchrun_two_nodes.sh paper/projector data.root=/data training.output_dir=/shared/runs/projector model.start_from=/shared/runs/contrastive/published
#   HEAD=first-machine bash torchrun_two_nodes.sh paper/finetune data.root=/data training.output_dir=/shared/runs/finetune model.start_from=/shared/runs/projector/published
# data.root, data.cache and training.output_dir must lie on a file system that both see. Two runs at a time with the same first
# machine need a PORT and a RUN_ID each, the same on both machines.
set -euo pipefail
# Beside NCCL the processes use gloo: `export GLOO_SOCKET_IFNAME=eth0`, the name of the network, if it picks another.
: "${HEAD:?set HEAD to the name of the first machine}"
# Seconds that the processes have to save after SIGTERM; without it torchrun kills them after 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}"
# The signals that torchrun passes on to them; of SIGUSR1 it would die by itself.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
exec torchrun --nnodes=2 --nproc_per_node="${GPUS_PER_NODE:-4}" \
  --rdzv_backend=c10d --rdzv_endpoint="${HEAD}:${PORT:-29500}" --rdzv_id="${RUN_ID:-med3dvlm}" \
  -m med3dvlm.train.cli train "$@"
