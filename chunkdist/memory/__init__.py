from chunkdist.memory.live_bytes import LiveBytes, LiveTensor

__all__ = ["LiveBytes", "LiveTensor"]
