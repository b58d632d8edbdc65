"""How many directions of an activation does the model above it read?"""
