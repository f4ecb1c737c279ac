#!/usr/bin/env bash
# The packaged bundle, `server/matvae_server/bundles/fashion-mnist`, from a data root.
#   fashion-mnist.sh DATA_ROOT OUT [OPTION...]
# Options are those of `matvae-train fit`, and replace those below. OUT-first is the bundle of the first pass.
set -euo pipefail
data_root=$1 out=${2%/}

# A plain MMD-VAE, whose codes say who is near whom.
first=("${@:3}" --objective mmd-vae --consistency none --neighbours 0 --out "$out-first")
[[ " $* " == *" --run "* ]] && first+=(--run "$out-first.run")
matvae-train fit --dataset fashion-mnist --data-root "$data_root" --threads 1 --bfloat16 "${first[@]}"

# The bundle: trains, fits heads and quantiser, measures on the test set, and writes the card with all of it.
matvae-train fit --dataset fashion-mnist --data-root "$data_root" --out "$out" --threads 1 --bfloat16 \
  --objective mmd-vae-neighbours --neighbours-of "$out-first" --consistency-weight 0.1 --epochs 60 "${@:3}"
