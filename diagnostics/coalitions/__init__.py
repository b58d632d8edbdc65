"""Who carries the effect when several act together: Shapley values of components patched jointly, and how pairs of them interact?"""
