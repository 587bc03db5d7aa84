"""`megatron-rl report`: what runs did, as one HTML page that needs no network. docs/report.md describes the page."""
