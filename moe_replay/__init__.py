"""Reinforcement learning for Mixture-of-Experts language models with routing replay."""
