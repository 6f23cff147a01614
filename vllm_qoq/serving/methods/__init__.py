"""The linear layers of a served model: one that routes, and a method for every kind of set."""
