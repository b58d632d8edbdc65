"""Can one attribute of an entity be changed through an SAE's latents while the others stay?"""
