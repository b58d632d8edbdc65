"""Does one signed latent represent both polarities of a direction? Planted antipodal pairs, SAEs trained on them."""
