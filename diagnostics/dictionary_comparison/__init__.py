"""Which latents do two dictionaries share, and how stable are they over training seeds?"""
