"""Preference optimisation for Qwen2.5-class language models on Megatron-Core. Importing this package changes nothing."""
