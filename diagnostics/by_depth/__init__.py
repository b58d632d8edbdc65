"""Figures by depth across results: several models, texts and SAEs in one panel."""
