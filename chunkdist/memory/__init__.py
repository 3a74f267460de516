from chunkdist.memory.live_bytes import LiveBytes

__all__ = ["LiveBytes"]
