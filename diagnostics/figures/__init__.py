"""What all figures share: looks, axes, captions, files."""
