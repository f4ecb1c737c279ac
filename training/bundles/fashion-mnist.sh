#!/usr/bin/env bash
# The packaged bundle, `server/matvae_server/bundles/fashion-mnist`, from a data root.
#   fashion-mnist.sh DATA_ROOT OUT [OPTION...]
# Options are those of `matvae-train fit`, and replace those below. OUT-first is the bundle of the first pass, which
# --resume keeps where it is whole.
set -euo pipefail
data_root=$1 out=${2%/}

# A plain MMD-VAE, whose codes say who is near whom.
first=("${@:3}" --objective mmd-vae --consistency none --neighbours 0 --out "$out-first")
[[ " $* " == *" --run"[\ =]* ]] && first+=(--run "$out-first.run")
# Fitted anew, by another commit or on another machine, it would not be the one that the second pass began with, which
# then could not go on. Its card is the last file to be written, so where there is one, the bundle is whole.
if [[ " $* " != *" --resume "* || ! -e $out-first/card.json ]]; then
  matvae-train fit --dataset fashion-mnist --data-root "$data_root" --threads 1 --bfloat16 "${first[@]}"
else
  echo "$out-first is whole: kept as it is"
fi

# The bundle: trains, fits heads and quantiser, measures on the test set, and writes the card with all of it.
matvae-train fit --dataset fashion-mnist --data-root "$data_root" --out "$out" --threads 1 --bfloat16 \
  --objective mmd-vae-neighbours --neighbours-of "$out-first" --consistency-weight 0.1 --epochs 60 "${@:3}"
