"""The quantized KV cache in vLLM's attention layers: backends, pages and refusals."""
