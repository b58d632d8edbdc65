"""How does an SAE's error fall with its width and its number of active latents?"""
