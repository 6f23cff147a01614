"""The meeting of vLLM and the plugin: what is registered, configured and refused."""
