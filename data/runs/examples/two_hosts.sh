#!/bin/sh
# Training on two hosts with torchrun. Run this on both of them, with the name of one of them, the same on both:
#   sh data/runs/examples/two_hosts.sh gpu1.example.org       (in the project's folder)
# Both need this project in the same place and at the same commit, and a disk that they share for runs and data.
set -eu
first=${1:?give the name of one of the two hosts}
gpus=$(nvidia-smi --list-gpus | wc -l)
exec .venv/bin/torchrun --nnodes 2 --nproc-per-node "$gpus" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id two-hosts \
  -m tinygrad_impl.train --preset gpt2 --init random --data stories --global-batch-tokens 524288 \
  --out runs/two-hosts --resume-if-any
