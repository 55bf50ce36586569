"""Plain PyTorch helpers that several packages share; nothing here imports another part of the library."""
