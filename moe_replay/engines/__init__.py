"""The engines that do the work: verl trains, vLLM generates, each in a process of its own."""
