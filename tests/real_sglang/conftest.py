"""Tests against real SGLang servers: `make test-sglang`."""
