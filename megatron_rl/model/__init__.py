"""The Megatron border: `config.json` to TransformerConfig, layer specs, building, vocab-parallel log-probs."""
