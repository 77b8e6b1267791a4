"""Suites of `--engine vllm`: vLLM with TokenDance inside, and the same vLLM without."""
