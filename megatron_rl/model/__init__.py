"""This package is the border to Megatron: it makes TransformerConfig from `config.json`, layer specs, models and
log-probs."""
