#!/bin/sh
# The comparison of gated and sign-aware SAEs at sites of block 15, trained together from one pass over the text (which goes on where
# it was interrupted); then, site by site, evaluation, census and effects of both polarities. What is there is not done again.
# WORKERS=2 trains in two processes of one thread each (with Ray), a fifth faster than one process of two threads.
#   scripts/polarity_zoo.sh results/polarity_zoo mlp_out attn_out resid_mid
set -eu
python=${PYTHON:-python}
out=$1
shift
run=$out/$(echo "$*" | tr ' ' '+')
$python scripts/train_sae.py --plan scripts/plans/polarity.txt --sites "$@" --layers 15 --tokens 1000000 ${WORKERS:+--workers "$WORKERS"} --out "$run"
for site in "$@"; do
    saes=$run/15.$site
    # The first SAE is what the others are compared with at equal L0.
    [ -e "$out/$site/gates" ] || $python scripts/evaluate_saes.py --saes "$saes"/gated-* "$saes"/signed-gated-tied-* "$saes"/signed-gated-l1* \
        "$saes"/one-sided-* "$saes"/no-auxiliary-* --splice-prompts 30 --out "$out/$site/gates"
    [ -e "$out/$site/topk" ] || $python scripts/evaluate_saes.py --saes "$saes"/standard-topk-* "$saes"/abstopk-* --splice-prompts 30 \
        --out "$out/$site/topk"
    [ -e "$out/$site/census" ] || $python scripts/bipolar_census.py --saes "$saes"/signed-gated-tied-* "$saes"/signed-gated-l1* \
        "$saes"/abstopk-* --out "$out/$site/census"
    # Goes on where it was interrupted, and skips what is done.
    $python scripts/interactions.py --parts polarity --saes "$saes"/signed-gated-tied-l1_0.22 "$saes"/signed-gated-l1_0.22 \
        "$saes"/abstopk-k32 --latents 24 --tokens-per-latent 4 --out "$out/$site/effects"
done
