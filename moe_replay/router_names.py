"""What the routers of Hugging Face's families are called."""

ROUTER_NAMES = ("gate", "router")
"""Last part of the path of a router's module, and the part before a router's tensors in a checkpoint."""
