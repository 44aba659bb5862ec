"""Files on disk and in object stores, whole or not at all."""
