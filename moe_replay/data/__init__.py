"""Prompts, rewards and benchmarks in verl's schema."""
