"""Causal decoders: Llama, Mistral, Qwen, OLMo, Gemma, SmolLM, GPT-2."""
