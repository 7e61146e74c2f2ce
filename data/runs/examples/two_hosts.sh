#!/bin/sh
# GPT-2 124M on all GPUs of two hosts, with torchrun. Run this on both of them, in the project's folder, with the name
# of one of them and the run's folder, the same on both:
#   sh data/runs/examples/two_hosts.sh gpu1.example.org runs/mine
# The same command goes on with a run that was stopped. Both hosts need this project in the same place and at the same
# commit, and a disk that they share for runs and data.
set -eu
first=${1:?give the name of one of the two hosts}
run=${2:?give the folder of the run}
data=tinystories # from the hub; or a text of your own: a file, a folder, or what data.text.prepare has made of it
gpus=$(nvidia-smi --list-gpus | wc -l)
exec .venv/bin/torchrun --nnodes 2 --nproc-per-node "$gpus" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$run" \
  -m tinygrad_impl.train --preset gpt2 --init random --data "$data" \
  --global-batch-tokens 524288 --batch-size 32 --out "$run" --resume-if-any
