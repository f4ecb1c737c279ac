#!/usr/bin/env bash
# `bundles/mnist` from a data root, by the recipe of the packaged bundle, with more weight on short prefixes.
#   mnist.sh DATA_ROOT OUT [OPTION...]
# Options are those of `matvae-train fit`, and replace those below.
set -euo pipefail
data_root=$1 out=$2

# Trains, fits heads and quantiser, measures on the test set, and writes the card with all of it.
matvae-train fit --dataset mnist --data-root "$data_root" --out "$out" --threads 1 --bfloat16 \
  --prefix-weights 10,12,6,3,1,1,1 "${@:3}"

# The card for people.
matvae-train card "$out" --out "$out/README.md"
