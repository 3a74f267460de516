"""What ties chunkdist to trainers. Each module imports its library, `import chunkdist` imports none of them."""
