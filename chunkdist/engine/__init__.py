"""The chunk scheduler: layer groups as autograd nodes that run their layers chunk by chunk."""
