"""Shows what runs did, as one HTML page that needs no network: `megatron-rl report`. docs/report.md describes the
page."""
