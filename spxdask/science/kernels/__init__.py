"""Compiled inner loops, a module for each topic; they read the pixels of a mapped frame."""
