"""Names of packaged models."""

DEFAULT_MODEL = "smollm2-135m"
COUNTERPART = "-layernorm"
"""what the name of a `layernorm_counterpart` ends with"""
LAYERNORM_MODEL = DEFAULT_MODEL + COUNTERPART
