"""Sparse autoencoders: score → selector → linear decoder; read, trained, put into a model."""
