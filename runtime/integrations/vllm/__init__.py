"""A plugin for vLLM: LLaVA-1.5 and LLaVA-NeXT that drop visual tokens inside `vllm serve`. For vLLM 0.32 and 0.33."""
