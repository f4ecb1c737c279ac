#!/usr/bin/env bash
# The packaged bundle, `server/matvae_server/bundles/fashion-mnist`, from a data root.
#   fashion-mnist.sh DATA_ROOT OUT [OPTION...]
# Options are those of `matvae-train fit`, for both passes, and replace those below.
set -euo pipefail
data_root=$1 out=$2

# A plain MMD-VAE, whose codes say who is near whom.
matvae-train fit --dataset fashion-mnist --data-root "$data_root" --threads 1 --bfloat16 "${@:3}" \
  --out "$out-first" --run "$out-first.run" --resume

# The bundle: trains, fits heads and quantiser, measures on the test set, and writes the card with all of it.
matvae-train fit --dataset fashion-mnist --data-root "$data_root" --out "$out" --threads 1 --bfloat16 \
  --objective mmd-vae-neighbours --neighbours-of "$out-first" "${@:3}"
