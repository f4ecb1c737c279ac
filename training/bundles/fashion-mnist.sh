#!/usr/bin/env bash
# The packaged bundle, `server/matvae_server/bundles/fashion-mnist`, from a data root.
#   fashion-mnist.sh DATA_ROOT OUT [OPTION...]
# Options are those of `matvae-train fit`, and replace those below.
set -euo pipefail
data_root=$1 out=$2

# Trains, fits heads and quantiser, measures on the test set, and writes the card with all of it.
matvae-train fit --dataset fashion-mnist --data-root "$data_root" --out "$out" --threads 1 --bfloat16 "${@:3}"
