"""Does ablating a concept's latents remove the concept and nothing else?"""
