"""The Qwen3 graph and the ways a linear layer is computed."""
