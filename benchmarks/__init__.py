"""Measurements of DCFT and its peers: speed and memory (`speed`), and quality (`quality`)."""
