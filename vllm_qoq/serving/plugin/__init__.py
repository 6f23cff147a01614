"""How vLLM meets the plugin: what is registered, configured and refused."""
