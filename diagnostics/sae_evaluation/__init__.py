"""How well does an SAE stand in for the activations it reads?"""
