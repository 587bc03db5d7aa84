"""The Megatron border: `config.json` to TransformerConfig, layer specs, building, log-probs."""
