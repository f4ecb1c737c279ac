#!/usr/bin/env bash
# `bundles/mnist`: the recipe of the packaged bundle, unchanged. From a data root to everything in it: mnist.sh DATA_ROOT OUT [OPTION...]
# Options of `matvae-train fit` may follow, and replace those below.
set -euo pipefail
data_root=$1 out=$2

# Trains, fits heads and quantiser, measures on the test set, and writes the card with all of it.
matvae-train fit --dataset mnist --data-root "$data_root" --out "$out" --threads 1 --bfloat16 "${@:3}"

# The card for people.
matvae-train card "$out" --out "$out/README.md"
