#!/usr/bin/env bash
# Trains, evaluates and writes a bundle's files for each of the three data sets, on a GPU: gpu.sh DATA_ROOT OUT [OPTION...]
# The recipes are those of training/bundles; options of `matvae-train fit` may follow, and replace those.
#   DATASETS  which ones                              (mnist fashion-mnist cifar10)
#   DEVICE    cpu tries the script where there is none (cuda)
# Writes OUT/<data set>/ (the bundle), OUT/<data set>.run/ (metrics, checkpoint; the same command goes on from it), the same
# of a first pass as OUT/<data set>-first, and OUT/<data set>.json (scores over three seeds of the probes).
set -euo pipefail
data_root=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
device=${DEVICE:-cuda}
# Where training is on the GPU, every core is there for heads and neighbours.
options=(--device "$device" --threads "$(nproc)")
# CUDA graphs pay on a GPU, and are of every prefix, so all six beside the whole code are trained at each step; a CPU would
# compile for longer than a trial of the script takes.
[ "$device" = cuda ] && options+=(--compile --prefixes-per-step 6)

for dataset in ${DATASETS:-mnist fashion-mnist cifar10}; do
  started=$SECONDS
  # The images as one file: read in a second from then on, and ready to be taken elsewhere.
  packed=$out/data/$dataset.npz
  [ -e "$packed" ] || matvae-train pack --dataset "$dataset" --data-root "$data_root" --out "$packed"
  "$here/bundles/$dataset.sh" "$packed" "$out/$dataset" --run "$out/$dataset.run" --resume "${options[@]}" "${@:3}"
  matvae-train evaluate "$out/$dataset" --data-root "$packed" --seeds 3 --out "$out/$dataset.json"
  echo "$dataset: $((SECONDS - started)) s"
done
