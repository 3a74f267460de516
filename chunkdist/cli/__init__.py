"""The `chunkdist` command."""
