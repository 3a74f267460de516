"""What ties chunkdist to trainers. Each module imports its own library; `import chunkdist` imports none."""
