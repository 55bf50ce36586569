"""Plain PyTorch helpers for all packages; none of them imports another part of the library."""
