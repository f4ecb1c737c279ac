#!/usr/bin/env bash
# `bundles/cifar10` from a data root, by a wider encoder and a contrast of two views: by distance up to 4 dimensions, by
# angle beyond.
#   cifar10.sh DATA_ROOT OUT [OPTION...]
# Options are those of `matvae-train fit`, and replace those below.
set -euo pipefail
data_root=$1 out=$2

# Trains, fits heads and quantiser, measures on the test set, and writes the card with all of it.
matvae-train fit --dataset cifar10 --data-root "$data_root" --out "$out" --name cifar10 \
  --objective mmd-vae-contrast-cosine --conv-channels 64,128,256,256 --batch-size 512 --epochs 80 \
  --prefixes-per-step 2 --prefix-weights .5,.4,.4,.5,.8,1.2,2 --threads 1 --bfloat16 "${@:3}"

# The card for people.
matvae-train card "$out" --out "$out/README.md"
