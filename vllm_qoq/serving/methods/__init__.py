"""The linear layers of a model that is served: one that routes, and a kind for every set."""
