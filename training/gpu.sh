#!/usr/bin/env bash
# Trains, evaluates and writes a bundle's files for each of the three data sets, on a GPU: gpu.sh DATA_ROOT OUT [OPTION...]
# The recipes are those of training/bundles, but for CIFAR-10's, to which a GPU gives a larger encoder and more epochs;
# options of `matvae-train fit` may follow, and replace those.
#   DATASETS  which ones                              (mnist fashion-mnist cifar10)
#   DEVICE    cpu tries the script where there is none (cuda); give a trial an OUT of its own
# Writes OUT/<data set>/ (the bundle), OUT/<data set>.run/ (metrics, checkpoint; the same command goes on from it), the same
# of a first pass as OUT/<data set>-first, and OUT/<data set>.json (scores over three seeds of the probes), by which a
# data set is done: run again, the script leaves it out, and goes on with those that have none.
set -euo pipefail
data_root=$1 out=$2
here=$(cd "$(dirname "$0")" && pwd)
device=${DEVICE:-cuda}
# Where training is on the GPU, every core is there for the rest.
options=(--device "$device" --threads "$(nproc)")
# CUDA graphs pay on a GPU, and are of every prefix, so all six beside the whole code are trained at each step; a CPU would
# compile for longer than a trial of the script takes.
[ "$device" = cuda ] && options+=(--compile --prefixes-per-step 6)

# An encoder in the images' own resolution.
photos=(--conv-channels 64,128,256,128 --residual-blocks 2 --stem-stride 1 --epochs 220 --weight-decay 0.05)

for dataset in ${DATASETS:-mnist fashion-mnist cifar10}; do
  started=$SECONDS
  scores=$out/$dataset.json
  if [ -s "$scores" ]; then
    echo "$dataset: done, $scores is there"
    continue
  fi
  # The images as one file: read in a second from then on, and ready to be taken elsewhere.
  packed=$out/data/$dataset.npz
  [ -e "$packed" ] || matvae-train pack --dataset "$dataset" --data-root "$data_root" --out "$packed"
  larger=()
  [ "$dataset" = cifar10 ] && [ "$device" = cuda ] && larger=("${photos[@]}")
  "$here/bundles/$dataset.sh" "$packed" "$out/$dataset" --run "$out/$dataset.run" --resume \
    "${options[@]}" ${larger[@]+"${larger[@]}"} "${@:3}"
  matvae-train evaluate "$out/$dataset" --data-root "$packed" --seeds 3 --device "$device" --out "$scores"
  echo "$dataset: $((SECONDS - started)) s"
done
