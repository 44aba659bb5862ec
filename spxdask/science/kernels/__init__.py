"""The compiled inner loops, by topic: pixels of a mapped frame in, numbers out."""
